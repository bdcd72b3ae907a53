#!/usr/bin/env bash
# Runs all tests, after installing what they need: scripts/test.sh [pytest arguments]
# SGLANG_VERSION=0.5.17 takes that release of SGLang.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
. scripts/release.sh
# One test server to a core, and one server at a time where they would share a GPU.
workers=$(command -v nvidia-smi >/dev/null && echo 1 || echo $(( $(nproc) < 8 ? $(nproc) : 8 )))
exec "$venv"/bin/python -m pytest -n "$workers" --dist loadgroup "$@"
