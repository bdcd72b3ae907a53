#!/usr/bin/env bash
# Serves a tiny model with MISA and asks it about a long text, after installing what that needs: scripts/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/python scripts/demo.py "$@"
