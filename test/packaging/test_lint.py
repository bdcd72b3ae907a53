"""`pre-commit` and `scripts/lint.sh` are the same tools in the same versions."""

import yaml
from environments import ROOT

# The repositories of hooks, by the name of the tool on PyPI.
HOOKS = {
    "black": "psf/black",
    "clang-format": "pre-commit/mirrors-clang-format",
    "codespell": "codespell-project/codespell",
    "isort": "PyCQA/isort",
    "mypy": "pre-commit/mirrors-mypy",
    "ruff": "astral-sh/ruff-pre-commit",
}


def test_versions_agree():
    lines = (ROOT / "scripts" / "lint-requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {hook["repo"]: hook["rev"].removeprefix("v") for hook in hooks}
    # Every hook but those of pre-commit itself, which look at no particular language.
    del revisions["https://github.com/pre-commit/pre-commit-hooks"]
    assert revisions == {
        f"https://github.com/{HOOKS[name]}": version for name, version in pins.items()
    }
