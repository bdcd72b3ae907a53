"""Where the time of a step goes: SGLang's own profile of one, read kernel by kernel."""

import gzip
import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Dict, List

import torch
from indexer.timing import added_times

from sglang_misa.client import Client

from .configurations import Workload

# What a kernel's name says of its part; the first that fits. The indexer: what scores and selects. Its projections are
# matrix products like others, and stay the same.
PARTS = {
    "indexer": r"mqa_logits|topk_transform|fast_topk|topk_512|clean_logits|route|score|select|threshold|rerank|pool_|pooled"
    r"|sample_kernel|get_k_and_s|getkands|index_buf|act_quant|hadamard",
    "attention": r"flash|mla|sparse_attn|fmha|set_mla_kv|concat_and_cast",
    "experts": r"moe|expert|grouped_gemm|silu|act_and_mul",
    "matrix products": r"gemm|cutlass|cublas|nvjet|matmul|splitk|gemv",
    "copies": r"memcpy|memset",
}
DECODE_STEPS = 8
SHOWN = 12  # kernels, those that take longest


def part_of(name: str) -> str:
    """The part of a model that a kernel belongs to, by its name."""
    for part, pattern in PARTS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return part
    return "other"


def read_trace(path: Path, steps: int) -> Dict:
    """The kernels of a Chrome trace.

    Returns:
        `span_us`: from the first kernel to the last, `busy_us`: in which one ran, `kernels`: [name, calls, us] by time, `parts`:
        us by part; all of one of `steps` steps. Where nothing ran on a GPU it is the same of torch's operations on the CPU,
        which contain each other.

    Raises:
        RuntimeError: there is nothing in it.
    """
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    for kinds in (("kernel", "gpu_memcpy", "gpu_memset"), ("cpu_op",)):
        chosen = [event for event in events if event.get("cat") in kinds]
        if chosen:
            break
    else:
        raise RuntimeError(f"{path} has no kernels")
    times: Dict[str, List[float]] = defaultdict(list)
    parts: Dict[str, float] = defaultdict(float)
    spans = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in chosen]
    for event in chosen:
        times[event["name"]].append(event["dur"])
        parts[part_of(event["name"])] += event["dur"] / steps
    first, last = min(start for _, start, _ in spans), max(end for _, _, end in spans)
    kernels = [(name, len(t) / steps, sum(t) / steps) for name, t in times.items()]
    return {
        "span_us": (last - first) / steps,
        "busy_us": sum(us for _, _, us in added_times(spans)) / steps,
        "kernels": sorted(kernels, key=lambda kernel: -kernel[2]),
        "parts": dict(sorted(parts.items(), key=lambda part: -part[1])),
    }


def random_prompts(server: Client, count: int, tokens: int) -> List[List[int]]:
    """Prompts of bench_serving's random ids."""
    from sglang.benchmark.datasets.random import sample_random_requests
    from sglang.benchmark.utils import get_tokenizer

    rows = sample_random_requests(
        input_len=tokens,
        output_len=1,
        num_prompts=count,
        range_ratio=1.0,
        tokenizer=get_tokenizer(server.info["tokenizer_path"]),
        dataset_path="",
        random_sample=False,
        return_text=False,
    )
    return [row.prompt for row in rows]


def profile(server: Client, context: int, chunk: int, sequences: int) -> Dict:
    """The last chunk of a prompt of `context` tokens, and a decode step of `sequences` such prompts, by `read_trace`.

    All but what is profiled is in the cache before.
    """
    server.flush_cache()
    (prompt,) = random_prompts(server, 1, context)
    server.generate(prompt[: context - chunk], 1)
    found = {"prefill": _profiled(server, [prompt], 1, "EXTEND")}
    server.flush_cache()
    prompts = random_prompts(server, sequences, context)
    for prompt in prompts:
        server.generate(prompt, 1)
    found["decode"] = _profiled(server, prompts, DECODE_STEPS, "DECODE")
    return found


def profiled(context: int, chunk: int, sequences: int) -> Dict[str, Workload]:
    """What each trace of `profile` is of."""
    return {
        "prefill": Workload(context, 1, 1, context - chunk),
        "decode": Workload(context, DECODE_STEPS, sequences, context),
    }


def shorten(trace: Dict) -> Dict:
    """A trace with the kernels that are shown alone; `parts` has all."""
    return trace | {"kernels": trace["kernels"][:SHOWN]}


def _profiled(server: Client, prompts: List[List[int]], steps: int, stage: str) -> Dict:
    activities = ["GPU"] if torch.cuda.is_available() else ["CPU"]
    with tempfile.TemporaryDirectory() as folder:
        body = {"output_dir": folder, "num_steps": steps, "profile_by_stage": True}
        server.post("/start_profile", activities=activities, **body)
        # It ends with the step behind the last one that is profiled.
        server.generate(prompts, DECODE_STEPS + 4)
        (trace,) = Path(folder).rglob(f"*TP-0*{stage}.trace.json.gz")
        return read_trace(trace, steps)


def show(label: str, found: Dict) -> str:
    """A table of each stage: the parts, and the kernels that take longest."""
    lines = []
    for stage, trace in found.items():
        busy = trace["busy_us"]
        lines.append(
            f"\n{label}, {stage}: {trace['span_us'] / 1e3:.2f} ms, of which kernels run in {busy / 1e3:.2f}"
        )
        for part, us in trace["parts"].items():
            lines.append(f"  {part:16} {us:10.0f} us {us / busy:6.1%}")
        for name, calls, us in shorten(trace)["kernels"]:
            lines.append(
                f"    {us:10.1f} us {us / busy:6.1%} {calls:6.1f} x {name[:90]}"
            )
    return "\n".join(lines)
