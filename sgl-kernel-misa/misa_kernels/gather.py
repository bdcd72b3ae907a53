"""Scoring of listed tokens, whose keys lie anywhere in the cache."""

import tilelang.language as T

from misa_kernels.accumulator import row_of

TILE = 128  # tokens whose keys are multiplied at a time, 64 a warpgroup


def get_score_listed(threads: int, stages: int, sum_heads):
    """The macro that scores the first `count` tokens of a list, a tile at a time.

    Args:
        stages: tiles on the chip: while one is scored, the next ones are gathered.
        sum_heads: a macro (row) that makes the two scores of a thread, `row.score`, of a tile's products in `row.acc` and their
            scales in `row.scale`.
    """

    @T.macro
    def gather(row, tile, count):
        T.call_extern(
            "handle",
            f"misa::gather_keys<{threads}, {TILE}>",
            row.keys.data,
            row.scales.data,
            T.address_of(row.scores[0]),
            tile * TILE,
            count,
            T.address_of(row.k_shared[tile % stages, 0, 0]),
            T.address_of(row.s_shared[tile % stages, 0]),
        )

    @T.macro
    def store(row, tile):
        """Entries that only fill up the last tile get scores too; nobody looks at them."""
        tx = T.get_thread_binding()
        for rr in T.unroll(2):
            row.scale[rr] = row.s_shared[tile % stages, row_of(tx) + rr * 8]
        sum_heads(row)
        if tx % 4 == 0:
            for rr in T.unroll(2):
                row.scores[tile * TILE + row_of(tx) + rr * 8] = T.call_extern(
                    "uint32", "misa::ordered", row.score[rr]
                )

    @T.macro
    def score_listed(row, count):
        """An entry of `row.scores` is a token's slot of the cache until its key is gathered, then its score, as an ordered key.

        Every thread's writes to the list, and to `row.q_shared` (fenced), must be followed by the barrier of
        `fill_last_tile`. Ends with a barrier.
        """
        T.call_extern(
            "handle",
            f"misa::fill_last_tile<{threads}, {TILE}>",
            T.address_of(row.scores[0]),
            count,
        )
        for tile in T.unroll(stages - 1):
            gather(row, tile, count)
        for tile in T.serial(T.ceildiv(count, TILE)):
            # This thread's part of the tile has arrived; after the barrier everybody's has, and everybody is done with the tile
            # before, whose stage the next gather overwrites.
            T.call_extern("handle", f"misa::wait_gathered<{stages - 2}>")
            T.sync_threads()
            T.wgmma_gemm(
                row.k_shared[tile % stages, :, :],
                row.q_shared,
                row.acc,
                transpose_B=True,
                clear_accum=True,
                policy=T.GemmWarpPolicy.FullRow,
            )
            gather(row, tile + stages - 1, count)
            T.warpgroup_wait(0)
            T.warpgroup_fence_operand(row.acc, num_regs=row.registers)
            store(row, tile)
        T.sync_threads()

    return score_listed
