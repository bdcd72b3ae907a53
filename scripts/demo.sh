#!/usr/bin/env bash
# Serves a tiny model with MISA and asks it about a long text, after installing what that needs: scripts/demo.sh
# SGLANG_VERSION=0.5.17 takes that release of SGLang.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
. scripts/release.sh
exec "$venv"/bin/python scripts/demo.py "$@"
