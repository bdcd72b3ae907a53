import sys
from pathlib import Path

# The builder of the kernels, for the tests here only: Transformers takes a package `kernels` for that of the Hugging Face Hub. Where it
# has looked for that already, it has found this folder of tests, which is forgotten again.
if getattr(sys.modules.get("kernels"), "__file__", None) is None:
    sys.modules.pop("kernels", None)
sys.path.append(str(Path(__file__).parents[2] / "sgl-kernel-misa"))
