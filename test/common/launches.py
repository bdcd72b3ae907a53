"""Arguments of SGLang's that several tests launch servers with."""

# As SGLang's cookbook launches it.
HICACHE = (
    *("--enable-hierarchical-cache", "--hicache-ratio", "2"),
    *("--hicache-mem-layout", "page_first_direct", "--hicache-io-backend", "direct"),
    *("--hicache-write-policy", "write_through"),
)
