"""What tests do otherwise with one release of SGLang than with another."""

from sglang.srt.distributed import parallel_state
from sglang.srt.runtime_context import get_parallel
from sglang.version import __version__


def initialize_tensor_parallel(rank: int, size: int) -> None:
    """SGLang's groups over gloo, in one of `size` processes."""
    if __version__ == "0.5.17":
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=size, backend="gloo"
        )
        return
    # From 0.5.20 on they are made of what a launcher published.
    ones = ("moe_ep", "pp", "attn_dp", "attn_cp", "moe_dp", "attn_dcp")
    get_parallel().override_permanently(
        **{f"{name}_size": 1 for name in ones},
        **{f"{name}_size": size for name in ("tp", "attn_tp", "shared_experts_tp")},
        **{f"{name}_rank": rank for name in ("tp", "attn_tp")},
    )
    parallel_state.initialize_model_parallel(backend="gloo")
