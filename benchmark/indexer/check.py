"""What every run is checked for, by the judge of the tests, on some rows of one layer; the form on all rows.

The checks of a record are a dict: what ends in `_error` is by how much a choice strays from the reference's as a share of the row's
largest score (None: it is no selection at all), what ends in `_problem` is what the judge finds wrong with it (None: nothing), and
the rest is true or false.
"""

import torch

from sglang.srt.layers.misa.testing import judge
from sglang.srt.layers.misa.testing.batches import Batch


def all_right(checks: dict) -> bool:
    return all(
        value is None if name.endswith("_problem") else value is not False
        for name, value in checks.items()
    )


def outcome(variant: str, checks: dict) -> str:
    """ "exact", or who is not: "wrong" is a fault of ours, "production inexact" is none.

    Production's top-k can drop candidates that share a coarse bin with many others.
    """
    if all_right(checks):
        return "exact"
    return "production inexact" if variant == "dsa" else "wrong"


def judged(name: str, check, *args, **options) -> dict:
    """Run a check of the judge on one thing after another -> {name_error, name_problem}."""
    try:
        return {f"{name}_error": check(*args, **options), f"{name}_problem": None}
    except judge.WrongSelection as wrong:
        error = None if wrong.error == float("inf") else wrong.error
        return {f"{name}_error": error, f"{name}_problem": str(wrong)}


class Sample:
    """Some rows of a batch, the first and the last among them."""

    def __init__(self, batch: Batch, count: int):
        device = batch.lengths.device
        picked = torch.linspace(0, len(batch.q) - 1, count, device=device)
        picked = picked.round().long().unique()
        self.batch, self.parts = batch, []
        for b, (sequence, rows) in enumerate(batch.rows()):
            mine = picked[(picked >= rows.start) & (picked < rows.stop)]
            if len(mine):
                own = sequence.of_rows(mine - rows.start)
                means = batch.pooled_keys[batch.pages(b)[: len(sequence.k) // 64]]
                self.parts.append((own, mine, means))

    def selection(
        self, positions, heads=None, candidates=None, *, shared=None, ties: bool = True
    ) -> float:
        """`judge.check_selection` of the sampled rows of a selection, int64 [T, k]."""
        errors = [0.0]
        for sequence, rows, _ in self.parts:
            error = judge.check_selection(
                positions[rows],
                sequence,
                None if heads is None else heads[rows],
                positions.shape[1],
                shared=None if shared is None else shared.of_rows(rows),
                candidates=None if candidates is None else candidates[rows],
                ties=ties,
            )
            errors.append(error)
        return max(errors)

    def routing(self, routed, block_size: int) -> float:
        """The judge's check of the router of the sampled rows."""
        errors = []
        for sequence, rows, means in self.parts:
            heads = routed.heads[rows]
            if routed.shared is None:
                error = judge.check_routing(heads, sequence, means, block_size)
            else:
                own = heads, *routed.shared.of_rows(rows)
                error = judge.check_sampled_routing(own, sequence)
            errors.append(error)
        return max(errors)


def well_formed(positions: torch.Tensor, lengths: torch.Tensor) -> bool:
    """Every row of int64 [T, k]: all or k of its `lengths` (int32 [T]) positions, ascending, then -1."""
    try:
        judge.check_form(positions, lengths.clamp(max=positions.shape[1]))
    except judge.WrongSelection:
        return False
    return bool((positions < lengths[:, None]).all())


def in_order(positions: torch.Tensor) -> torch.Tensor:
    """The same sets in ascending order with -1 last, which production does not promise."""
    end = torch.iinfo(positions.dtype).max
    ordered = positions.masked_fill(positions == -1, end).sort(dim=1).values
    return ordered.masked_fill(ordered == end, -1)


def check_production(variant, sample: Sample) -> dict:
    """The set of production; it breaks ties as it likes."""
    positions = in_order(variant.positions(variant.total(0)))
    return judged("selection", sample.selection, positions, ties=False)


def check_ours(variant, sample: Sample) -> dict:
    """Every claim on layer 0."""
    output = variant.total(0)
    positions = variant.positions(output)
    lengths = sample.batch.lengths
    checks = {
        "well_formed": well_formed(positions, lengths),
        "deterministic": torch.equal(output, variant.total(0)),
    }
    routed = variant.route(0)
    if routed.heads is None:
        return checks | judged("selection", sample.selection, positions)
    checks |= judged("routing", sample.routing, routed, variant.block_size)
    if not variant.candidates:
        return checks | judged(
            "selection", sample.selection, positions, routed.heads, shared=routed.shared
        )
    candidates = variant.score_select(0, routed).long()
    checks["candidates_well_formed"] = well_formed(candidates, lengths)
    checks |= judged(
        "candidates", sample.selection, candidates, routed.heads, shared=routed.shared
    )
    return checks | judged(
        "selection", sample.selection, positions, candidates=candidates
    )
