"""The README's table of launches says what the code does."""

import re
from pathlib import Path

import pytest

from sglang.srt.layers.misa import releases
from sglang.srt.layers.misa.environment import EVAL_SELECTION
from sglang.srt.layers.misa.releases.installed import RELEASE
from sglang.srt.layers.misa.server_args import REFUSALS

ROOT = Path(__file__).parents[2]
# Those of the other releases, whose modules cannot be imported here.
SOURCE = "".join(
    path.read_text() for path in Path(releases.__file__).parent.glob("v*.py")
)
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
    messages = {refusal.message for refusal in REFUSALS}
    assert all(x in messages or f'"{x}"' in SOURCE for x in sentences)
    tests = re.findall(r"`(test_\w+\.py::\w+)`", evidence)
    assert all(is_test(name) for name in tests)
    if says in ("works", "works on a CPU"):
        assert tests and not sentences
    elif says == "refused":
        assert tests or sentences
    else:
        assert says == "not tested" and not tests and not sentences


def test_every_refusal_is_in_it():
    evidence = " ".join(row[-1] for row in table())
    for refusal in (*RELEASE.REFUSALS, *REFUSALS):
        # What is refused to an evaluation concerns no operator.
        if EVAL_SELECTION not in refusal.message:
            assert f'"{refusal.message}"' in evidence
