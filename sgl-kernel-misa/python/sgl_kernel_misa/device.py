"""How many CTAs a device runs at once, which is what grids are laid out for.

No selection depends on it: CTAs share out tokens, not sums, and what they select is exact. The one exception is the routing
estimate of `route_topk_decode`. There the CTAs of a cluster each add up a part of a head's sum, so how many they are,
`cluster_ranks` of the number of sequences, decides in which order float32 numbers are added, and two heads whose estimates
agree up to rounding may change places. On a device with 78 SMs (H20) clusters become smaller at fewer sequences than on one
with 132 (H100, H200), as they do between batches of different sizes on the same device.
"""

import functools

import torch
from sgl_kernel_misa.constants import DECODE_ROUTE_RANKS

# Clusters by their size of which a device with 132 SMs holds so many with two CTAs on an SM: a cluster does not straddle
# two GPCs. Measured on an H100. Other devices are taken to hold as many for their SMs; where they hold fewer, some clusters
# run after others, and nothing else changes.
CLUSTERS = {8: 30, 4: 64, 2: 132}
MEASURED_SMS = 132


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return _num_sms(device.index)


@functools.lru_cache(maxsize=None)
def _num_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def cluster_ranks(count: int, ctas_per_sm: int, sms: int) -> int:
    """CTAs of each of `count` clusters, one of DECODE_ROUTE_RANKS: the most with which the device holds all at once.

    Args:
        ctas_per_sm: CTAs that fit on an SM, 1 or 2.
        sms: the device's SMs.
    """
    fitting = (
        ranks
        for ranks, most in CLUSTERS.items()
        if count <= most * sms // MEASURED_SMS * ctas_per_sm // 2
    )
    return next(fitting, min(DECODE_ROUTE_RANKS))
