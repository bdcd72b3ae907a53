import pytest
import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.selection import positions, to_output, topk_mask

SCORES = {
    "random": lambda rows, columns: torch.randn(rows, columns),
    "few values": lambda rows, columns: torch.randint(3, (rows, columns)).float(),
    "zeros": lambda rows, columns: torch.zeros(rows, columns),
    "signed zeros": lambda rows, columns: torch.zeros(rows, columns)
    * torch.randn(rows, columns).sign(),
    "infinities": lambda rows, columns: torch.tensor(
        [1.0, float("inf"), -float("inf")]
    )[torch.randint(3, (rows, columns))],
    "some NaN": lambda rows, columns: torch.tensor(
        [1.0, float("nan"), -float("nan"), float("inf"), -float("inf")]
    )[torch.randint(5, (rows, columns))],
    "NaN": lambda rows, columns: torch.full((rows, columns), float("nan")),
    "rising": lambda rows, columns: torch.arange(float(columns)).expand(rows, -1),
    "falling": lambda rows, columns: -torch.arange(float(columns)).expand(rows, -1),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("columns", [1, 99, 100, 101, 700])
def test_selects_as_defined(kind, columns, device):
    torch.manual_seed(0)
    scores = SCORES[kind](50, columns).to(device)
    lengths = torch.randint(1, columns + 1, (50,), device=device)
    allowed = reference.visible(lengths, columns)
    selected = positions(topk_mask(scores, allowed, 100), 100)
    assert torch.equal(selected, reference.top_positions(scores, allowed, 100).int())
    assert torch.equal((selected >= 0).sum(1), lengths.clamp(max=100))


def test_selects_among_any_allowed_subset(device):
    torch.manual_seed(0)
    scores = torch.randint(5, (60, 400), device=device).float()
    allowed = torch.rand(60, 400, device=device) < torch.rand(60, 1, device=device)
    selected = positions(topk_mask(scores, allowed, 100), 100)
    assert torch.equal(selected, reference.top_positions(scores, allowed, 100).int())


def test_forms_for_the_attention(device):
    def tensor(values):
        return torch.tensor(values, device=device, dtype=torch.int32)

    # Two rows of the first sequence, none of the second, one of the third.
    selected = tensor([[0, 63, 64], [5, 130, -1], [1, 65, -1]])
    page_table, cu_rows = tensor([[7, 2, 9], [1, 1, 1], [4, 5, 0]]), tensor(
        [0, 2, 2, 3]
    )
    slots = to_output(selected, "slots", page_table, cu_rows)
    assert slots.tolist() == [
        [7 * 64, 7 * 64 + 63, 2 * 64],
        [7 * 64 + 5, 9 * 64 + 2, -1],
        [4 * 64 + 1, 5 * 64 + 1, -1],
    ]
    offsets = tensor([1000, 1000, 2000])
    ragged = to_output(selected, "ragged", page_table, cu_rows, offsets)
    assert ragged.tolist() == [
        [1000, 1063, 1064],
        [1005, 1130, -1],
        [2001, 2065, -1],
    ]
    assert slots.dtype == ragged.dtype == torch.int32
    assert to_output(selected, "positions", page_table, cu_rows) is selected
    with pytest.raises(ValueError, match="'pages' is not positions, slots or ragged"):
        to_output(selected, "pages", page_table, cu_rows)
