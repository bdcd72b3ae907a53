# Of sgl-kernel-misa and sglang-misa, which are released together; both builds read it here.
__version__ = "0.1.2"
