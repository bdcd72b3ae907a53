#!/usr/bin/env bash
# Installs SGLang, MISA and the test suite into .venv: with CUDA where there is an NVIDIA GPU, else for the CPU.
# Does nothing when that has been done already. SGLANG_VERSION=0.5.17 takes that release, in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/release.sh

inputs=(scripts/setup.sh scripts/release.sh pyproject.toml setup.py python/sglang_misa.pth sgl-kernel-misa/python/sgl_kernel_misa/version.py sgl-kernel-misa/pyproject.toml sgl-kernel-misa/build-requirements.txt test/requirements.txt test/cpu_engine/pyproject.toml "test/cpu_engine/requirements-$release.txt")
stamp=$venv/.installed-$(cat "${inputs[@]}" | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0

echo "Installing SGLang $release into $venv; this takes a few minutes, once."
python3 -m venv --clear "$venv"
pip() { "$venv"/bin/python -m pip --disable-pip-version-check "$@"; }
if command -v nvidia-smi >/dev/null; then
  pip install -e . "sglang==$release"
  # Takes nvcc; TileLang, which it is built with, comes and goes with the isolated build.
  pip install ./sgl-kernel-misa
else
  # For both releases: 0.5.23 asks for 2.14.1, but serves with this too, its compiled radix tree included.
  pip install torch==2.13.0
  pip install --no-deps -r "test/cpu_engine/requirements-$release.txt"
  if [ "$release" = "$default_release" ]; then
    # The kernels are compiled here too, for the tests of their package; only a GPU runs them.
    pip install --no-deps -r sgl-kernel-misa/build-requirements.txt
    pip install --no-build-isolation --no-deps -e ./sgl-kernel-misa
  else
    # They don't know SGLang: compiled and tested once, and of their package the other release has what it says in Python.
    echo "$PWD/sgl-kernel-misa/python" > "$("$venv"/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sgl_kernel_misa.pth"
  fi
  pip install --no-deps -e . -e test/cpu_engine
fi
pip install -r test/requirements.txt
touch "$stamp"
