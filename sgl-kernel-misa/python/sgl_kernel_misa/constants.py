"""What the kernels and the code that launches them both rely on: sizes, limits and codes, each of which has its home here.

Imports nothing, so that the kernels' build can read it without the package. The CUDA headers have constants of their own for
what they rely on; every kernel asserts at compile time that they are these (`misa_kernels/headers.py`).
"""

# The paged index-K cache: a page holds the keys of 64 tokens, one byte a dimension, then their float32 scales.
PAGE_SIZE = 64  # tokens
HEAD_DIM = 128  # dimensions of a key or a query, and bytes of either in FP8
PAGE_KEY_BYTES = PAGE_SIZE * HEAD_DIM  # before the scales
PAGE_BYTES = PAGE_SIZE * (HEAD_DIM + 4)

NUM_HEADS = (32, 64)  # of an indexer
# Slots with which a row is scored: what is compiled, for up to so many. Decode reads every key once for few rows, so fewer than 8
# would not make it faster.
DECODE_SLOTS = (8, 16, 32, 64)
PREFILL_SLOTS = (2, 4, *DECODE_SLOTS)
MAX_CONTEXT = 1 << 22  # tokens: positions are 22 bits of a sort key
MAX_TOPK = 16384  # tokens, and candidates of a re-rank
# Of a sequence that decode takes together: what is compiled, for up to so many.
DECODE_ROWS = (4, 8)
MAX_ROWS = DECODE_ROWS[-1]

ROUTER_CTAS_PER_SM = 2  # of `route_sampled`: as many as that share the rows. A third only waits longer for its samples

# What a selection is written as. The numbers are the kernels' argument `form`.
FORMS = {"positions": 0, "slots": 1, "ragged": 2}

# Prefill.
SPAN = 1024  # tokens in 32 words of a bit plane
# Of a CTA that finds a row's thresholds: up to MANY_SAMPLES, where its histograms take the time, and above, where the samples do.
THRESHOLD_THREADS = (128, 256)
MANY_SAMPLES = 4096
SELECT_CAPACITIES = (
    3072,
    6144,
)  # candidates of a row that a CTA keeps in shared memory; multiples of SPAN

# CTAs that share a row or a sequence: the sizes of clusters that are compiled.
DECODE_ROUTE_RANKS = (1, 2, 4, 8)
DECODE_ROUTE_ROWS = 4  # whose heads each of them picks, at most
DECODE_SELECT_RANKS = (2, 4, 8)
RERANK_RANKS = (1, 8)

SCORE_CTAS_PER_SM = {8: 2, 16: 2, 32: 1, 64: 1}  # of `decode_score`, by DECODE_SLOTS
DECODE_CANDIDATES = 6144  # tokens that a CTA of `decode_select` lists
RERANK_CAPACITIES = (4096, 8192, MAX_TOPK)  # candidates that a row may have


def rows_per_warpgroup(heads: int) -> int:
    """Rows that a warpgroup of `score` takes with `heads` slots each: as many as make 128 columns, but 4 at least, and no more than 32,
    whose thresholds fit into registers."""
    return min(32, max(4, 128 // heads))


def rows_per_tile(heads: int) -> int:
    """Rows that a CTA of `score` takes: two warpgroups' share."""
    return 2 * rows_per_warpgroup(heads)
