"""The definitions: which prefix tokens each query selects under DSA, MISA, MISA with a shared head, and HISA.

Plain torch and nothing else: no pages, no batches, no caches. One sequence at a time, everything else is tested
against it. Shapes used throughout:

    q         [T, H, 128]  float8_e4m3fn   indexer queries, one row a token, H heads
    weights   [T, H]       float32         head gates, with q's quantization scale folded in
    k         [S, 128]     float8_e4m3fn   indexer keys of the sequence, from its first token
    k_scale   [S]          float32         k's quantization scale, one a token
    lengths   [T]          int64           tokens visible to each query: positions 0 .. lengths[t] - 1
    heads     [T, h]       int64           routed heads of each query, ascending
    shared_q      [T, 128]  float8_e4m3fn  the shared head's query, and
    shared_scale  [T]       float32        its scale, a power of two

Every selection returns int64 [T, topk]: positions in ascending order, padded with -1. Equal scores are broken in
favour of the lower position. Forced tokens (a model's index_init_tokens and index_local_tokens) score +inf.

A score that is NaN ranks below every number, an estimate of a head that is NaN above every one: whatever the bits are, a row
selects exactly min(topk, lengths[t]) positions, each once, and exactly active_heads heads score them. Kernels keep to that
too, but a score may be a number there and NaN here: their relu of NaN is 0.

Sources: DSA, arXiv 2512.02556 (eq. 1); MISA, arXiv 2605.07363; HISA, arXiv 2603.28458. The shared head, and the
re-ranking of a band, are this project's own.
"""

from typing import Tuple

import torch

PAGE_SIZE = 64
FP8_MAX = 448.0
# A prefix of more tokens than this is sampled, by at least half as many.
MAX_SAMPLES = 256


def dot(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[T, 128] x [S, 128] -> float32 [T, S]: dot products, rounded once.

    A product of FP8 values is summed exactly in float64, so the result depends on no order of summation.
    """
    return (q.double() @ k.double().T).float()


def token_scores(
    q, weights, k, k_scale, shared_q=None, shared_scale=None
) -> torch.Tensor:
    """I[t,s] = k_scale[s] * sum_j weights[t,j] * relu(q[t,j] . k[s]) -> float32 [T, S].

    The sum runs over heads in ascending order in float32. A shared head adds shared_scale[t] * (shared_q[t] . k[s]) to it
    as its last term, without a relu.
    """
    scores = torch.zeros(q.shape[0], k.shape[0], device=q.device)
    k = k.double()  # once, not once a head
    for j in range(q.shape[1]):
        scores += weights[:, j, None] * dot(q[:, j], k).relu()
    if shared_q is not None:
        scores += shared_scale[:, None] * dot(shared_q, k)
    return scores * k_scale


def force(scores, lengths, init_tokens: int = 0, local_tokens: int = 0) -> torch.Tensor:
    """Score the first `init_tokens` and the last `local_tokens` visible positions of every row +inf."""
    position = torch.arange(scores.shape[1], device=scores.device)
    forced = (position < init_tokens) | (position >= lengths[:, None] - local_tokens)
    return scores.masked_fill(forced, float("inf"))


def visible(lengths: torch.Tensor, tokens: int) -> torch.Tensor:
    """Which of the first `tokens` positions each query sees -> bool [T, tokens]."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def top_positions(scores, allowed, topk: int) -> torch.Tensor:
    """The `topk` positions of highest score among the `allowed` ones (bool [T, S]) of every row."""
    # Two stable sorts order the positions by (allowed, a number, score, lower position first).
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rank = (2 * allowed.int() - scores.isnan().int()).gather(1, order)
    ranks = rank.sort(dim=1, descending=True, stable=True)
    best = order.gather(1, ranks.indices)[:, :topk]
    end = scores.shape[1]
    best = best.masked_fill(~allowed.gather(1, best), end).sort(dim=1).values
    best = best.masked_fill(best == end, -1)
    return torch.nn.functional.pad(best, (0, topk - best.shape[1]), value=-1)


def dsa(q, weights, k, k_scale, lengths, topk, **forced) -> torch.Tensor:
    """DeepSeek Sparse Attention: every head scores every visible token."""
    scores = force(token_scores(q, weights, k, k_scale), lengths, **forced)
    return top_positions(scores, visible(lengths, len(k)), topk)


def page_means(k, k_scale) -> torch.Tensor:
    """Mean dequantized key of every complete 64-token page -> bfloat16 [S // 64, 128].

    Summed in float64 in the order of the tokens, so that a page's content alone decides the bytes.
    """
    pages = k.shape[0] // PAGE_SIZE
    keys = (k.double() * k_scale.double()[:, None])[: pages * PAGE_SIZE]
    total = torch.zeros(pages, k.shape[1], dtype=torch.float64, device=k.device)
    for token in keys.unflatten(0, (pages, PAGE_SIZE)).unbind(1):
        total += token
    return (total / PAGE_SIZE).float().bfloat16()


def block_means(means: torch.Tensor, block_size: int) -> torch.Tensor:
    """Pooled keys of blocks of `block_size` tokens, the last one possibly partial: [P, 128] -> bfloat16 [M, 128]."""
    blocks = means.double().split(block_size // PAGE_SIZE)
    return torch.stack([block.mean(0) for block in blocks]).float().bfloat16()


def head_estimates(q, weights, means, lengths, block_size: int) -> torch.Tensor:
    """What each head is expected to contribute to each query -> float32 [T, H].

    E[t,j] = mean over blocks b of | weights[t,j] * relu(q[t,j] . kbar[b]) |, where the blocks are those of the
    complete pages that lie in t's prefix.
    """
    estimates = torch.zeros_like(weights)
    for t, length in enumerate(lengths.tolist()):
        if length >= PAGE_SIZE:
            pooled = block_means(means[: length // PAGE_SIZE], block_size)
            estimate = (weights[t, :, None] * dot(q[t], pooled).relu()).abs()
            estimates[t] = estimate.double().mean(1).float()
    return estimates


def best_heads(estimates, active_heads: int) -> torch.Tensor:
    """The `active_heads` heads of the largest estimates of each query, in ascending order -> int64 [T, active_heads].

    Equal estimates are broken in favour of the lower head.
    """
    best = estimates.sort(dim=1, descending=True, stable=True).indices
    return best[:, :active_heads].sort(dim=1).values


def route(q, weights, means, lengths, active_heads: int, block_size: int):
    """The `active_heads` heads that contribute most to each query, see `best_heads`."""
    estimates = head_estimates(q, weights, means, lengths, block_size)
    return best_heads(estimates, active_heads)


def of_heads(q, weights, heads) -> Tuple[torch.Tensor, torch.Tensor]:
    """The queries and weights of the `heads`, int64 [T, h], of each query -> float32 [T, h, 128], float32 [T, h]."""
    routed_q = q.float().gather(1, heads[:, :, None].expand(-1, -1, q.shape[2]))
    return routed_q, weights.gather(1, heads)


def misa(
    q,
    weights,
    k,
    k_scale,
    lengths,
    topk,
    *,
    active_heads=8,
    block_size=1024,
    rerank_candidates=0,
    taken=0,
    **forced,
) -> torch.Tensor:
    """MISA: only the routed heads score the tokens.

    With `rerank_candidates` > 0, the hierarchical variant, see `best_of`.
    """
    heads = route(q, weights, page_means(k, k_scale), lengths, active_heads, block_size)
    scores = token_scores(*of_heads(q, weights, heads), k, k_scale)
    rows = q, weights, k, k_scale, lengths
    return best_of(scores, *rows, topk, rerank_candidates, taken, **forced)


def best_of(
    scores,
    q,
    weights,
    k,
    k_scale,
    lengths,
    topk,
    rerank_candidates=0,
    taken=0,
    **forced,
) -> torch.Tensor:
    """The `topk` visible positions of highest score, or, of `rerank_candidates` > 0 of those, the ones that all heads choose.

    In the second case the first `taken` <= topk of the candidates are selected as they are, and beside them those of the
    rest that all heads score highest. Forced tokens are among the first.
    """
    scores, allowed = force(scores, lengths, **forced), visible(lengths, len(k))
    if rerank_candidates:
        first = members(top_positions(scores, allowed, taken), len(k))
        allowed = members(top_positions(scores, allowed, rerank_candidates), len(k))
        scores = force(token_scores(q, weights, k, k_scale), lengths, **forced)
        scores = scores.masked_fill(first, float("inf"))
    return top_positions(scores, allowed, topk)


def sample_positions(length: int) -> torch.Tensor:
    """S, the positions whose keys stand for a prefix of `length` tokens -> int64 [n], ascending.

    One token of every d = 2 ** shift, n = length // d of them: all up to 256 tokens, else 128 to 256. Which one changes from
    stride to stride (multiplicative hashing), so that no period in the text can follow. A longer prefix's first token, to
    which models attend for its own sake and whose key may be unlike all others, is none of them.
    """
    shift = ((max(length, 1) - 1) // MAX_SAMPLES).bit_length()
    i = torch.arange(length >> shift)
    offset = ((i + 1) * 2654435761) % 2**32 >> (32 - shift)
    return (i << shift) + offset


def sequential_sum(samples: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, float64 [n, ...] -> float64 [...], of samples added one by one in their order."""
    total = samples.new_zeros(samples.shape[1:])
    for sample in samples.unbind():
        total += sample
    return total


def mean(samples: torch.Tensor) -> torch.Tensor:
    """The mean over the first dimension, float64 [n, ...] -> float64 [...], by `sequential_sum`."""
    return sequential_sum(samples) / len(samples)


def lines(x: torch.Tensor):
    """The line c x that says most of relu(x), and what it leaves unsaid, of samples x, float32 [n, H] with n > 0.

    c = Cov(relu(x), x) / Var(x), the slope of least squares, and the standard deviation of relu(x) - c x: float64 [H] both.
    The signs decide where relu is a line on all samples, so that no rounding does: 1 and 0 where all x > 0, 0 and 0 where
    all x <= 0. Elsewhere the variance is positive.
    """
    positive, x = x > 0, x.double()
    y = x.relu()
    from_mean = x - mean(x)
    slope = mean((y - mean(y)) * from_mean) / mean(from_mean.square())
    slope = slope.masked_fill(positive.all(0), 1).masked_fill(~positive.any(0), 0)
    rest = y - slope * x
    return slope, mean((rest - mean(rest)).square()).sqrt()


def slopes_and_estimates(q, weights, k, k_scale, lengths):
    """c and e, float32 [T, H]: the slope of each head's line for each query, and what the line leaves unsaid of the head.

    e[t,j] = |weights[t,j]| * Std_S(relu(x_j) - c[t,j] x_j) with x_j(s) = k_scale[s] * (q[t,j] . k[s]); both are 0 for a
    query that sees nothing.
    """
    slopes, estimates = torch.zeros_like(weights), torch.zeros_like(weights)
    for t, length in enumerate(lengths.tolist()):
        if length:
            samples = sample_positions(length).to(k.device)
            slope, rest = lines((k_scale[samples] * dot(q[t], k[samples])).T)
            slopes[t] = slope.float()
            estimates[t] = (weights[t].abs() * rest).float()
    return slopes, estimates


def shared_query(q, weights, slopes, heads):
    """The query of the shared head, which has the lines of all heads but the routed `heads` -> shared_q, shared_scale.

    u[t] = sum over the other heads j of slopes[t,j] * weights[t,j] * q[t,j], in ascending order in float32, rounded to FP8
    as shared_q * shared_scale. The scale is the smallest power of two, from 2 ** -126 on, with which no value is above
    FP8's largest, and 1 where u = 0.
    """
    factors = (slopes * weights).scatter(1, heads, 0)
    u = torch.zeros(q.shape[0], q.shape[2], device=q.device)
    for j in range(q.shape[1]):
        u += factors[:, j, None] * q[:, j].float()
    largest = u.abs().amax(1)
    mantissa, exponent = torch.frexp(largest)
    exponent = exponent - 9 + (mantissa * 2**9 > FP8_MAX)
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(min=-126))
    scale = torch.where(largest > 0, scale, 1)
    return (u / scale[:, None]).to(torch.float8_e4m3fn), scale


def route_sampled(q, weights, k, k_scale, lengths, active_heads: int):
    """Heads of the largest estimates for `active_heads` - 1 slots, and the shared head for the last one.

    Returns heads [T, active_heads - 1], see `best_heads`, shared_q and shared_scale.
    """
    slopes, estimates = slopes_and_estimates(q, weights, k, k_scale, lengths)
    heads = best_heads(estimates, active_heads - 1)
    return heads, *shared_query(q, weights, slopes, heads)


def misa_shared(
    q,
    weights,
    k,
    k_scale,
    lengths,
    topk,
    *,
    active_heads=8,
    rerank_candidates=0,
    taken=0,
    **forced,
) -> torch.Tensor:
    """MISA with a shared head: `active_heads` - 1 routed heads score the tokens, and the shared one for all others.

    All H heads are DSA, with nothing left to share. With `rerank_candidates` > 0 all heads choose among those, see
    `best_of`.
    """
    rows = q, weights, k, k_scale, lengths
    if active_heads >= q.shape[1]:
        return dsa(*rows, topk, **forced)
    heads, *shared = route_sampled(*rows, active_heads)
    scores = token_scores(*of_heads(q, weights, heads), k, k_scale, *shared)
    return best_of(scores, *rows, topk, rerank_candidates, taken, **forced)


def members(positions: torch.Tensor, tokens: int) -> torch.Tensor:
    """Rows of positions, -1 padded, as sets -> bool [T, tokens]."""
    columns = positions.masked_fill(positions < 0, tokens)
    mask = torch.zeros(
        len(positions), tokens + 1, dtype=torch.bool, device=positions.device
    )
    return mask.scatter(1, columns, True)[:, :tokens]


def hisa_pooled(k, k_scale, block_size=128) -> torch.Tensor:
    """HISA's mean dequantized key of every block, the last one possibly partial -> float32 [M, 128]."""
    keys = (k.double() * k_scale.double()[:, None]).split(block_size)
    return torch.stack([block.mean(0) for block in keys]).float()


def hisa_tokens(
    q, weights, pooled, lengths, tokens, *, block_size=128, top_blocks=64
) -> torch.Tensor:
    """The visible ones among the first `tokens` positions that lie in each query's best blocks -> bool [T, tokens].

    The first and the last visible block of a row are always among them, so only complete blocks compete.
    """
    pooled = pooled[: -(-tokens // block_size)]
    ones = torch.ones(len(pooled), device=pooled.device)
    block_lengths = (lengths + block_size - 1) // block_size
    scores = token_scores(q, weights, pooled, ones)
    scores = force(scores, block_lengths, init_tokens=1, local_tokens=1)
    blocks = top_positions(scores, visible(block_lengths, len(pooled)), top_blocks)
    allowed = members(blocks, len(pooled)).repeat_interleave(block_size, 1)
    return allowed[:, :tokens] & visible(lengths, tokens)


def hisa(
    q, weights, k, k_scale, lengths, topk, *, block_size=128, top_blocks=64, **forced
) -> torch.Tensor:
    """HISA: all heads score the mean keys of blocks, then the tokens of the best blocks."""
    blocks = {"block_size": block_size, "top_blocks": top_blocks}
    pooled = hisa_pooled(k, k_scale, block_size)
    allowed = hisa_tokens(q, weights, pooled, lengths, len(k), **blocks)
    scores = force(token_scores(q, weights, k, k_scale), lengths, **forced)
    return top_positions(scores, allowed, topk)
