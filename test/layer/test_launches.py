"""The README's table of launches says what the code does, with SGLang 0.5.17."""

import re
from pathlib import Path

import pytest

from sglang.srt.layers.misa.environment import EVAL_SELECTION
from sglang.srt.layers.misa.releases.installed import RELEASE
from sglang.srt.layers.misa.server_args import REFUSALS
from sglang.version import __version__

pytestmark = pytest.mark.skipif(
    __version__ != "0.5.17", reason="the table is that of SGLang 0.5.17"
)

ROOT = Path(__file__).parents[2]
HEADER = "| launch | | tests, or the sentence of refusal |\n| --- | --- | --- |\n"


def table():
    """(launch, what it says of it, evidence) for each row."""
    _, _, rest = (ROOT / "README.md").read_text().partition(HEADER)
    rows, _, _ = rest.partition("\n\n")
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows.split("\n")]


def is_test(name):
    file, _, function = name.partition("::")
    (path,) = (ROOT / "test").rglob(file)
    return bool(re.search(rf"^def {function}\(", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("launch, says, evidence", table())
def test_a_row(launch, says, evidence):
    sentences = re.findall(r'"([^"]*)"', evidence)
    refusals = (*REFUSALS, *RELEASE.REFUSALS)
    assert set(sentences) <= {refusal.message for refusal in refusals}
    tests = re.findall(r"`(test_\w+\.py::\w+)`", evidence)
    assert all(is_test(name) for name in tests)
    if says in ("works", "works on a CPU", "not run"):
        assert tests and not sentences
    elif says == "refused":
        assert tests or sentences
    else:
        assert says == "not tested" and not tests and not sentences


def test_every_refusal_is_in_it():
    evidence = " ".join(row[-1] for row in table())
    for refusal in (*REFUSALS, *RELEASE.REFUSALS):
        # What is refused to an evaluation concerns no operator.
        if EVAL_SELECTION not in refusal.message:
            assert f'"{refusal.message}"' in evidence
