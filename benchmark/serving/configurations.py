"""Which servers are compared, and what each of them is asked."""

import itertools
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from sglang.srt.layers.misa.environment import EVAL_SELECTION
from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE

BASELINE = "dsa"
# As they are served, where benchmark/quality measures each of them on every row: arguments and environment.
VARIANTS: Dict[str, Tuple[Tuple[str, ...], Dict[str, str]]] = {
    BASELINE: ((), {}),
    "misa-default": (("--enable-misa",), {}),
    "misa": (("--enable-misa", "--misa-rerank-candidates", "0"), {}),
    "misa-pooled": (
        ("--enable-misa", "--misa-router", "pooled", "--misa-decode", "misa"),
        {},
    ),
    "misa-pooled-hierarchical": (
        (
            *("--enable-misa", "--misa-router", "pooled", "--misa-decode", "misa"),
            *("--misa-rerank-candidates", "8192"),
        ),
        {},
    ),
    # Prompts only: decode stays SGLang's.
    "free": (
        ("--enable-misa", "--cuda-graph-backend-prefill", "disabled"),
        {EVAL_SELECTION: "free"},
    ),
}
EAGLE = (
    *("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3"),
    *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4"),
)
# The least prompts of a run whose prefixes are cached.
CONVERSATIONS = 8

Sweep = Tuple[str, List[str]]


@dataclass(frozen=True)
class Configuration:
    """A server beside those arguments that all have: its variant, the swept options, its environment.

    `speculative` is the acceptance length that is pinned, in tokens a step; None without speculative decoding.
    """

    variant: str
    options: Tuple[str, ...] = ()
    speculative: Optional[float] = None

    @property
    def arguments(self) -> Tuple[str, ...]:
        speculation = EAGLE if self.speculative else ()
        return (*VARIANTS[self.variant][0], *speculation, *self.options)

    @property
    def env(self) -> Dict[str, str]:
        env = dict(VARIANTS[self.variant][1])
        if self.speculative:
            env["SGLANG_SIMULATE_ACC_LEN"] = str(self.speculative)
        return env

    @property
    def label(self) -> str:
        parts = [self.variant, *self.options]
        return " ".join(parts + [f"EAGLE {self.speculative}"] * bool(self.speculative))


def parse_sweep(text: str) -> Sweep:
    """`misa-active-heads=4,8` as ("--misa-active-heads", ["4", "8"]).

    Raises:
        ValueError: it is not of this form.
    """
    name, _, values = text.partition("=")
    chosen = values.split(",")
    if not name.strip("-") or not all(chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(f"{text!r} is not of the form name=value,value")
    return "--" + name.lstrip("-"), chosen


def _combinations(sweeps: Sequence[Sweep]) -> List[Tuple[str, ...]]:
    names = [name for name, _ in sweeps]
    values = itertools.product(*(values for _, values in sweeps))
    return [tuple(itertools.chain(*zip(names, chosen))) for chosen in values]


def make_groups(
    variants: Sequence[str],
    sweeps: Sequence[Sweep] = (),
    speculative: Sequence[Optional[float]] = (None,),
) -> List[Tuple[Configuration, List[Configuration]]]:
    """Each baseline with the configurations that are compared with it.

    MISA's own arguments are no part of a baseline; any other one that is swept has a baseline for each value.
    """
    own = [sweep for sweep in sweeps if sweep[0].startswith("--misa-")]
    common = [sweep for sweep in sweeps if sweep not in own]
    return [
        (
            Configuration(BASELINE, options, accepted),
            [
                Configuration(variant, options + more, accepted)
                for variant in variants
                if variant != BASELINE
                for more in _combinations(own)
            ],
        )
        for accepted in speculative
        for options in _combinations(common)
    ]


@dataclass(frozen=True)
class Workload:
    """Prompts of `context` tokens, of which the first `cached` are in the radix cache, and `output` new tokens for each."""

    context: int
    output: int
    concurrency: int
    cached: int = 0

    def __str__(self) -> str:
        cached = f" ({self.cached} cached)" if self.cached else ""
        return f"{self.context}{cached}/{self.output} x {self.concurrency}"


@dataclass(frozen=True)
class Session:
    """What is measured on a server in one go, after its cache was emptied: one workload, or the turns of conversations.

    `prompts` are those of every workload; `fill` tokens of each are sent before the first.
    """

    workloads: Tuple[Workload, ...]
    prompts: int
    fill: int = 0

    @property
    def room(self) -> int:
        """Tokens that the KV cache has to hold, so that neither requests wait nor prefixes are dropped."""
        last = self.workloads[-1]
        at_once = self.prompts if self.fill else min(self.prompts, last.concurrency)
        # Whole pages, and some more for each, which a server allocates ahead.
        pages = -(-(last.context + last.output) // PAGE_SIZE) + 2
        return at_once * pages * PAGE_SIZE


def make_sessions(
    contexts: Sequence[int],
    outputs: Sequence[int],
    concurrency: Sequence[int],
    prompts: int,
    cached_contexts: Sequence[int] = (),
    extends: Sequence[int] = (),
    extend_output: int = 32,
) -> Iterator[Session]:
    """The sessions, shorter contexts first.

    Args:
        prompts: how many times as many prompts as are sent at once.
        cached_contexts: tokens of the prefixes that are cached before the turns.
        extends: new tokens of each turn, a turn after the other.
    """
    for context, output, count in itertools.product(contexts, outputs, concurrency):
        yield Session((Workload(context, output, count),), prompts * count)
    for prefix, count in itertools.product(cached_contexts, concurrency):
        turns, cached = [], prefix
        for new in extends:
            turns.append(Workload(cached + new, extend_output, count, cached))
            cached += new
        if turns:
            yield Session(tuple(turns), max(CONVERSATIONS, 2 * count), prefix)
