#!/usr/bin/env bash
# Installs SGLang, MISA and the test suite into .venv: with CUDA where there is an NVIDIA GPU, else for the CPU.
# Does nothing when that has been done already.
set -euo pipefail
cd "$(dirname "$0")/.."

inputs=(scripts/setup.sh pyproject.toml setup.py python/sglang_misa.pth sgl-kernel-misa/python/sgl_kernel_misa/version.py sgl-kernel-misa/pyproject.toml sgl-kernel-misa/build-requirements.txt test/requirements.txt test/cpu_engine/pyproject.toml test/cpu_engine/requirements.txt)
stamp=.venv/.installed-$(cat "${inputs[@]}" | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0

echo "Installing into .venv; this takes a few minutes, once."
python3 -m venv --clear .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
if command -v nvidia-smi >/dev/null; then
  pip install -e .
  # Takes nvcc; TileLang, which it is built with, comes and goes with the isolated build.
  pip install ./sgl-kernel-misa
else
  pip install torch==2.13.0
  pip install --no-deps -r test/cpu_engine/requirements.txt
  pip install --no-deps -r sgl-kernel-misa/build-requirements.txt
  # The kernels are compiled here too, for the tests of their package; only a GPU runs them.
  pip install --no-build-isolation --no-deps -e ./sgl-kernel-misa
  pip install --no-deps -e . -e test/cpu_engine
fi
pip install -r test/requirements.txt
touch "$stamp"
