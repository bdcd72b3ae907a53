"""SGLang's paged index-K cache: a page holds 64 keys of 128 bytes, then their 64 float32 scales."""

import tilelang.language as T

PAGE_BYTES = 8448
PAGE_WORDS = (
    PAGE_BYTES // 4
)  # of 4 bytes: as many floats lie between the scales of two pages


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
