"""Where a thread's numbers lie in the accumulator of a wgmma, whose warps have 16 rows each."""


def row_of(thread):
    """The first of the two rows in which `thread` has numbers; the other is 8 rows on. Lanes 4i .. 4i + 3 share row i."""
    return thread // 32 * 16 + thread % 32 // 4
