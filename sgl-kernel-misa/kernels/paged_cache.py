"""SGLang's paged index-K cache, see `kernels.constants`."""

import tilelang.language as T

from kernels.constants import PAGE_BYTES

# Words of 4 bytes: as many floats lie between the scales of two pages.
PAGE_WORDS = PAGE_BYTES // 4


def get_gather_keys(threads: int, tile: int, stages: int):
    """The macro that begins to copy the keys of one tile of listed slots of the cache to its stage in shared memory."""

    @T.macro
    def gather_keys(keys, scales, slots, index, count, k_shared, s_shared):
        T.call_extern(
            "handle",
            f"misa::gather_keys<{threads}, {tile}>",
            keys.data,
            scales.data,
            T.address_of(slots[0]),
            index * tile,
            count,
            T.address_of(k_shared[index % stages, 0, 0]),
            T.address_of(s_shared[index % stages, 0]),
        )

    return gather_keys
