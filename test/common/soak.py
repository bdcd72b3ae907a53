"""What production does to a server: many requests at once, of mixed lengths, some of which are aborted."""

import os
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Union

import requests
from pd import Pair

from sglang_misa.server import RecordedServer, tokens

# A soak goes on for so long, though it sent enough requests before.
MINUTES = float(os.environ.get("SOAK_MINUTES", 0))
ROUND = 20


Server = Union[RecordedServer, Pair]


def soak(
    server: Server,
    count: int,
    longest: int,
    users: int,
    check: Callable[[], None],
) -> Counter:
    """Send requests in rounds, and check each round's records, before they are dropped.

    Most prompts are short. A third go on from an earlier prompt, and of every ten one is aborted at any time.

    Args:
        count: requests, at least.
        longest: tokens of the longest prompt.
        users: requests at once.

    Returns:
        How many were "finished" and "aborted".
    """
    rng, outcomes, end = random.Random(0), Counter(), time.monotonic() + 60 * MINUTES
    while outcomes.total() < count or time.monotonic() < end:
        seeds = [rng.randrange(1 << 30) for _ in range(ROUND)]
        with ThreadPoolExecutor(users) as threads:
            for outcome in threads.map(lambda seed: _ask(server, seed, longest), seeds):
                outcomes[outcome] += 1
        check()
        server.forget()
    return outcomes


def _ask(server: Server, seed: int, longest: int) -> str:
    rng = random.Random(seed)
    size = int(longest ** rng.uniform(0.3, 1))
    # Few texts, of which prompts are the beginnings: a third of them are in the cache, as far as it reaches.
    text = rng.randrange(3) if rng.random() < 1 / 3 else seed
    prompt, new_tokens, rid = tokens(size, text), rng.randint(1, 64), f"soak-{seed}"
    if rng.random() > 0.1:
        answer = server.generate(prompt, new_tokens, rid)
        assert len(answer["output_ids"]) == new_tokens
        return "finished"
    with ThreadPoolExecutor(1) as thread:
        doomed = thread.submit(server.generate, prompt, 500, rid)
        time.sleep(rng.random() * 0.3)
        server.post("/abort_request", rid=rid)
        try:
            reason = doomed.result()["meta_info"]["finish_reason"]["type"]
        except requests.HTTPError:
            # It had not begun.
            return "aborted"
    return "aborted" if reason == "abort" else "finished"
