"""SGLang's paged index-K cache, see `misa_kernels.constants`."""

from misa_kernels.constants import PAGE_BYTES

# Words of 4 bytes: as many floats lie between the scales of two pages.
PAGE_WORDS = PAGE_BYTES // 4
