"""Times, memory and profiles. All times in milliseconds."""

import time
from dataclasses import dataclass

import torch

# So few that their launches fit into a stream's queue, which takes about a thousand.
HOST_CALLS = 10
# Keeps the device busy for about a millisecond, so that the host is ahead when a round of eager calls begins.
HEAD_START_CYCLES = 2_000_000


@dataclass
class Spread:
    """Median and 10th and 90th percentile of one call."""

    median: float
    p10: float
    p90: float


def spread(times: list) -> Spread:
    points = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    times = torch.tensor(times, dtype=torch.float64)
    return Spread(*torch.quantile(times, points).tolist())


class Graph:
    """One CUDA graph that runs `call` over all layers, one after another; `output` is what it wrote for the last."""

    def __init__(self, call, layers: int):
        # The call holds the tensors that the graph reads.
        self.call, self.layers = call, layers
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(layers):
                call(i)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(layers):
                self.output = call(i)

    def __call__(self, _: int) -> None:
        self.graph.replay()


class Eager:
    """`call` on one layer after another, one a call."""

    def __init__(self, call, layers: int):
        self.call, self.count, self.layers = call, layers, 1
        for i in range(layers):
            call(i)

    def __call__(self, i: int) -> None:
        self.call(i % self.count)


def measure(runs: dict, iterations: int) -> dict:
    """Time every run (`Graph` or `Eager`) once a round, so that all see the same clocks -> {key: Spread}.

    The eager ones of a round take different layers, so that none finds its keys in L2.
    """
    for run in runs.values():
        for i in range(3):
            run(i)
    events = {key: [] for key in runs}
    for round in range(iterations):
        torch.cuda._sleep(HEAD_START_CYCLES)
        for n, (key, run) in enumerate(runs.items()):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(round + n)
            end.record()
            events[key].append((start, end))
    torch.cuda.synchronize()
    return {
        key: spread([a.elapsed_time(b) / runs[key].layers for a, b in pairs])
        for key, pairs in events.items()
    }


def host_times(runs: dict, iterations: int) -> dict:
    """What the host takes for a call of every run, while the device does not keep it waiting -> {key: Spread}."""
    times: dict = {key: [] for key in runs}
    for _ in range(iterations):
        for key, run in runs.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for i in range(HOST_CALLS):
                run(i)
            end = time.perf_counter()
            times[key].append((end - start) * 1e3 / HOST_CALLS)
    torch.cuda.synchronize()
    return {key: spread(values) for key, values in times.items()}


def workspace_bytes(call) -> int:
    """Peak of the memory that one call takes from torch's allocator, without its result."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - output.nbytes


def copy_gbps(size: int = 2**31, copies: int = 10) -> float:
    """Bytes read and written a second by copies of `size` bytes on the device, in GB/s."""
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = Eager(lambda i: target.copy_(source), 1)
    milliseconds = measure({"copy": copy}, copies)["copy"].median
    return 2 * size / milliseconds / 1e6


def fp8_tflops(size: int = 8192, products: int = 10) -> float:
    """Floating-point operations a second of a matrix product of random FP8 numbers, in TFLOPS."""
    a, b = (
        torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2)
    )
    one = torch.ones((), device="cuda")
    multiply = Eager(
        lambda i: torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        ),
        1,
    )
    milliseconds = measure({"multiply": multiply}, products)["multiply"].median
    return 2 * size**3 / milliseconds / 1e9


def added_times(kernels: list) -> list:
    """Kernels of a stream -> [(name, launches, time)], longest first; their times add up to that in which any runs.

    A kernel that is launched programmatically starts while the one ahead of it still runs, and waits: it counts from when that one
    has ended.

    Args:
        kernels: (name, start, end) of each.
    """
    times: dict = {}
    ended = float("-inf")
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        launches, time_of = times.get(name, (0, 0.0))
        added = max(0.0, end - max(start, ended))
        times[name] = (launches + 1, time_of + added)
        ended = max(ended, end)
    return sorted(
        ((name, *rest) for name, rest in times.items()), key=lambda kernel: -kernel[2]
    )


def profile(call) -> list:
    """Kernels of one call -> [(name, launches, microseconds)] of `added_times`."""
    call(0)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call(0)
        torch.cuda.synchronize()
    return added_times(
        [
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
    )
