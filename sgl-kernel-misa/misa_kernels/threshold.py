"""Three thresholds a row, from its sampled scores: between them lies the k-th score, or `select` will notice."""

import tilelang.language as T

from misa_kernels.dimensions import dimensions
from misa_kernels.headers import SCRATCH, include

THRESHOLD_BINS = 1024  # of each of two histograms


def get_threshold_kernel(threads: int):
    """One CTA of so many threads a row.

    The histograms are CUDA: TileLang has no digit of a key, and its reductions do not find a bin.
    """
    rows, bounds, slots, width = dimensions("rows bounds slots width")

    @T.prim_func
    def threshold(
        samples: T.Tensor((slots, width), T.float32),
        cu_rows: T.Tensor((bounds,), T.int32),
        lengths: T.Tensor((rows,), T.int32),
        out: T.Tensor((slots, 3), T.float32),
        batch: T.int32,
        first_tile: T.int32,
        tile_rows: T.int32,
        topk: T.int32,
        sample_shift: T.int32,
        deviations: T.int32,
        room: T.int32,
    ):
        with T.Kernel(slots, threads=threads) as slot:
            T.import_source(include("threshold.cuh", kThresholdBins=THRESHOLD_BINS))
            # The next kernel may start, and wait like this one: its launch takes as long as the last blocks here.
            T.pdl_trigger()
            T.pdl_sync()
            T.annotate_min_blocks_per_sm(1024 // threads)  # 64 registers a thread
            bins = T.alloc_shared((2 * THRESHOLD_BINS,), T.int32)
            scratch = T.alloc_shared((SCRATCH,), T.int32)
            row = T.alloc_var(T.int32)
            tile = first_tile + T.truncdiv(slot, tile_rows)
            seq = T.call_extern(
                "int32", "misa::sequence_of_tile", cu_rows.data, batch, tile, tile_rows
            )
            row = T.call_extern(
                "int32",
                "misa::first_row_of_tile",
                cu_rows.data,
                seq,
                tile,
                tile_rows,
            )
            row += T.truncmod(slot, tile_rows)
            if seq < batch and row < cu_rows[T.min(seq + 1, batch)]:
                if lengths[row] > topk:
                    T.call_extern(
                        "handle",
                        f"misa::thresholds<{threads}>",
                        T.address_of(samples[slot, 0]),
                        lengths[row],
                        topk,
                        sample_shift,
                        deviations,
                        room,
                        T.address_of(bins[0]),
                        T.address_of(scratch[0]),
                        T.address_of(out[slot, 0]),
                    )

    return threshold
