"""Is a selection the reference's, up to ties?

A sample of rows is scored by `reference.py` on the device. Kernels add in another order and in float32, so tokens whose
scores differ by less than a tolerance may change places; how far a selection strays from the reference's is reported as
one number, relative to the largest score of the row: 0 when it is exactly a top k, infinite when it is no selection.
"""

from dataclasses import dataclass

import torch

from sglang.srt.layers.misa import reference

from .data import Layer, Step, keys_of


@dataclass
class Sequence:
    """The sampled rows of one sequence.

    rows     int64 [n]         rows of the step
    q, weights, lengths        of these rows, as `reference` takes them
    k, k_scale                 the sequence's keys
    means    bfloat16 [P, 128] the sequence's page means
    scores   float32 [n, S]    by all heads
    visible  bool [n, S]
    """

    rows: torch.Tensor
    q: torch.Tensor
    weights: torch.Tensor
    lengths: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    means: torch.Tensor
    scores: torch.Tensor
    visible: torch.Tensor


class Truth:
    """What the reference says about `samples` rows of one layer, first and last among them."""

    def __init__(self, step: Step, layer: Layer, samples: int = 16):
        rows = torch.linspace(0, step.case.rows - 1, samples).round().long().unique()
        rows = rows.to(step.lengths.device)
        self.sequences = []
        for b in step.row_sequence[rows].unique().tolist():
            mine = rows[step.row_sequence[rows] == b]
            q = layer.q.view(torch.uint8)[mine].view(torch.float8_e4m3fn)
            weights = layer.weights[mine]
            lengths = step.lengths[mine].long()
            k, k_scale = keys_of(step, layer, b)
            self.sequences.append(
                Sequence(
                    rows=mine,
                    q=q,
                    weights=weights,
                    lengths=lengths,
                    k=k,
                    k_scale=k_scale,
                    means=layer.pooled_keys[step.pages(b)],
                    scores=reference.token_scores(q, weights, k, k_scale),
                    visible=reference.visible(lengths, len(k)),
                )
            )

    def dsa_error(self, positions: torch.Tensor, candidates=None) -> float:
        """Of a selection by all heads, int64 [T, topk], among `candidates` (int64 [T, m]) if given."""
        errors = [0.0]
        for s in self.sequences:
            allowed = s.visible
            if candidates is not None:
                allowed = members(candidates[s.rows], len(s.k))
            errors.append(selection_error(s.scores, allowed, positions[s.rows]))
        return max(errors)

    def misa_error(self, positions: torch.Tensor, heads: torch.Tensor) -> float:
        """Of a selection int64 [T, topk] by each row's own `heads`, int32 [T, h]."""
        errors = [0.0]
        for s in self.sequences:
            active = heads[s.rows].long()
            q = s.q.float().gather(1, active[:, :, None].expand(-1, -1, s.q.shape[2]))
            weights = s.weights.gather(1, active)
            scores = reference.token_scores(q, weights, s.k, s.k_scale)
            errors.append(selection_error(scores, s.visible, positions[s.rows]))
        return max(errors)

    def routing_error(self, heads: torch.Tensor, block_size: int) -> float:
        """Of the choice of heads, int32 [T, h]."""
        errors = [0.0]
        for s in self.sequences:
            estimates = reference.head_estimates(
                s.q, s.weights, s.means, s.lengths, block_size
            )
            everything = torch.ones_like(estimates, dtype=torch.bool)
            chosen = heads[s.rows].long()
            errors.append(selection_error(estimates, everything, chosen))
        return max(errors)


def members(positions: torch.Tensor, tokens: int) -> torch.Tensor:
    """`reference.members` of int64 [T, k] whose entries may be anything -> bool [T, tokens]."""
    inside = (positions >= 0) & (positions < tokens)
    return reference.members(positions.masked_fill(~inside, -1), tokens)


def selection_error(scores, allowed, chosen) -> float:
    """How far `chosen`, int64 [n, k], strays from the k highest `scores`, float32 [n, S], of those `allowed`.

    The largest amount by which a chosen score falls short of the row's k-th score, or one left out exceeds it, over
    the row's largest score. Infinite if a row has too few or too many entries, a duplicate or one not allowed.
    """
    mask = members(chosen, scores.shape[1])
    count = allowed.sum(1).clamp(max=chosen.shape[1])
    entries = (chosen != -1).sum(1)
    if (mask & ~allowed).any() or (mask.sum(1) != count).any():
        return float("inf")
    if (entries != count).any() or not scores.isfinite().all():
        return float("inf")
    best = scores.masked_fill(~allowed, -torch.inf)
    best = best.topk(min(chosen.shape[1], scores.shape[1])).values
    kth = best.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]
    lowest_in = scores.masked_fill(~mask, torch.inf).amin(1)
    highest_out = scores.masked_fill(~allowed | mask, -torch.inf).amax(1)
    largest = scores.masked_fill(~allowed, 0).abs().amax(1).clamp(min=1e-30)
    error = torch.maximum(kth - lowest_in, highest_out - kth) / largest
    error = error.masked_fill(count == 0, 0)
    return error.clamp(min=0).max().item()


def well_formed(positions: torch.Tensor, lengths: torch.Tensor) -> bool:
    """Every row of int64 [T, k]: all or k of its `lengths` (int32 [T]) positions, ascending, then -1."""
    valid = positions >= 0
    before, after = positions[:, :-1], positions[:, 1:]
    ordered = (after > before) & valid[:, :-1] | (after == -1)
    enough = valid.sum(1) == lengths.clamp(max=positions.shape[1])
    inside = (positions >= -1) & (positions < lengths[:, None])
    return bool(ordered.all() and enough.all() and inside.all())
