import sys
from pathlib import Path

# The builder of the kernels, for the tests here only: Transformers takes a package `kernels` for that of the Hugging Face Hub.
sys.path.append(str(Path(__file__).parents[2] / "sgl-kernel-misa"))
