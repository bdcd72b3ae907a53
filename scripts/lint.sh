#!/usr/bin/env bash
# Checks formatting, imports, spelling and types, with tools of its own in .venv-lint: scripts/lint.sh [--fix]
# With --fix, rewrites what the tools can rewrite first.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv-lint/.installed-$(sha256sum < scripts/lint-requirements.txt | cut -c1-16)
if [ ! -e "$stamp" ]; then
  python3 -m venv --clear .venv-lint
  .venv-lint/bin/python -m pip --disable-pip-version-check install --quiet --only-binary :all: -r scripts/lint-requirements.txt
  touch "$stamp"
fi
PATH=$PWD/.venv-lint/bin:$PATH

# Results and checkpoints are data.
files() { git ls-files -z -- "$@" ':!benchmark/results' ':!scripts/mini_dsa/checkpoint*'; }
python() { files '*.py' | xargs -0 "$@"; }
cpp() { files '*.cuh' '*.cpp' '*.h' | xargs -0 clang-format "$@"; }

if [ "${1:-}" = --fix ]; then
  python ruff check --quiet --fix-only
  python isort --quiet
  python black --quiet
  cpp -i
fi

# All of them run, so that one run shows everything that is wrong.
status=0
python isort --check-only --diff || status=1
python ruff check --quiet || status=1
python black --check --diff --quiet || status=1
cpp --dry-run --Werror || status=1
files | xargs -0 codespell --toml pyproject.toml || status=1
mypy || status=1
exit $status
