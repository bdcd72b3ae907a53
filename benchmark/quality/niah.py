"""Needles in a haystack, found or not by a running SGLang server, over context length and depth:

    python benchmark/quality/niah.py --url http://127.0.0.1:30000 --haystack text.txt --output niah.json
    python benchmark/quality/plot_niah.py niah.json niah.png         # needs matplotlib

A needle says a number that is asked for at the end. With several, the first lies at the depth that is measured and the others
anywhere; each is asked for by a request of its own. Each has a key of its own, or, with --alike, they have one key and are told
apart by an adjective that the question names, so that an answer must not come from a needle that is only like it. What the server runs (DSA, MISA and its numbers) is read from the server.
Every variant is asked the same questions. Answers are kept beside the output, so a run that was broken off goes on, and
several servers can be asked one after another into the same file.
"""

import argparse
import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Dict, List, Tuple

from kept_answers import KeptAnswers
from tqdm import tqdm

from sglang_misa.client import Client

NEEDLE = "\nThe {adjective} number of {key} is {value}.\n"
QUESTION = (
    "\nWhat is the {adjective} number of {key}? The {adjective} number of {key} is"
)
# The first is that of needles with keys of their own. All have six letters but the first, so prompts differ by few tokens.
ADJECTIVES = (
    *("magic", "secret", "hidden", "golden", "silent", "second", "winter", "broken"),
    "purple",
)
ANSWER_TOKENS = 12
SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
DEPTHS = range(0, 101, 10)  # percent of the text before a needle


@dataclass(frozen=True)
class Trial:
    """One haystack. context: tokens of the prompt; depth: percent of the way to the question; alike: the needles have one key."""

    context: int
    depth: int
    needles: int
    number: int
    # Not in what the random numbers are made of, so that trials without it stay what they were.
    alike: bool = field(default=False, repr=False)


def make_needles(trial: Trial) -> Dict[Tuple[str, str], str]:
    """Adjective and key, and value, of every needle; the same for the same trial.

    Raises:
        ValueError: more needles are alike than there are adjectives.
    """
    rng = random.Random(repr(trial))
    if trial.alike:
        if trial.needles >= len(ADJECTIVES):
            raise ValueError(f"at most {len(ADJECTIVES) - 1} needles can be alike")
        key = "".join(rng.choices(SYLLABLES, k=4))
        names = [(adjective, key) for adjective in rng.sample(ADJECTIVES[1:], trial.needles)]  # fmt: skip
        return {name: str(rng.randrange(1_000_000, 10_000_000)) for name in names}
    needles: Dict[Tuple[str, str], str] = {}
    while len(needles) < trial.needles:
        key = "".join(rng.choices(SYLLABLES, k=4))
        needles[ADJECTIVES[0], key] = str(rng.randrange(1_000_000, 10_000_000))
    return needles


def tell(name: Tuple[str, str], value: str) -> str:
    adjective, key = name
    return NEEDLE.format(adjective=adjective, key=key, value=value)


def question(name: Tuple[str, str]) -> str:
    adjective, key = name
    return QUESTION.format(adjective=adjective, key=key)


def make_prompts(
    trial: Trial, haystack: List[int], tokenize
) -> List[Tuple[List[int], str]]:
    """The prompts of a trial, token ids, each with the value that it asks for.

    Args:
        haystack: token ids of the text, at least as many as the context.
        tokenize: from a string to token ids.

    Raises:
        ValueError: the needles and the question do not fit into the context.
    """
    rng = random.Random(f"{trial!r} places")
    needles = make_needles(trial)
    told = [tokenize(tell(name, value)) for name, value in needles.items()]
    asked = [tokenize(question(name)) for name in needles]
    room = trial.context - sum(map(len, told)) - max(map(len, asked))
    if room < 0:
        raise ValueError(
            f"{trial.needles} needles do not fit into {trial.context} tokens"
        )
    begin = rng.randrange(len(haystack) - room + 1)
    hay = haystack[begin : begin + room]
    depths = [trial.depth] + [rng.uniform(0, 100) for _ in told[1:]]
    places = sorted((round(room * d / 100), i) for i, d in enumerate(depths))
    text, done = [], 0
    for place, i in places:
        text += hay[done:place] + told[i]
        done = place
    text += hay[done:]
    return [(text + a, value) for a, value in zip(asked, needles.values())]


def summarize(answers: List[Dict]) -> List[Dict]:
    """One record a variant, context, depth and number of needles: the share that was found, by question.

    ci95 is half the width of the Wilson interval, in which the share lies.
    """
    cells: Dict[Tuple, List[bool]] = {}
    for answer in answers:
        cell = {k: v for k, v in answer.items() if k not in ("number", "found")}
        cells.setdefault(tuple(cell.items()), []).extend(answer["found"])
    results = []
    for cell, found in cells.items():
        n, z = len(found), 1.96
        share = sum(found) / n
        ci95 = (
            z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
        )
        results.append(
            dict(cell) | {"metric": "niah", "value": share, "ci95": ci95, "n": n}
        )
    return results


def ask(server: Client, trial: Trial, haystack: List[int]) -> List[bool]:
    """Whether each needle of a trial is found."""
    return [
        server.complete(tokens, ANSWER_TOKENS).strip().startswith(value)
        for tokens, value in make_prompts(trial, haystack, server.tokenize)
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", required=True, help="of the server")
    add("--haystack", type=Path, required=True, help="a text longer than any context")
    add("--output", type=Path, required=True, help="the result, JSON")
    add("--contexts", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    add("--depths", type=int, nargs="+", default=DEPTHS)
    add("--needles", type=int, nargs="*", default=[1, 4])
    add("--alike", type=int, nargs="*", default=[], help="needles of one key")
    add("--trials", type=int, default=10, help="of every cell")
    add("--parallel", type=int, default=4, help="requests at once")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    server = Client(args.url)
    variant = server.variant()
    haystack = server.tokenize(args.haystack.read_text(errors="replace"))
    if len(haystack) < max(args.contexts):
        raise SystemExit(
            f"niah: --haystack {args.haystack} has {len(haystack)} tokens, fewer than --contexts {max(args.contexts)}"
        )
    kept = KeptAnswers(args.output)
    names = Trial.__dataclass_fields__
    done = {
        Trial(**{name: answer[name] for name in names if name in answer})
        for answer in kept.of(**variant)
    }
    kinds = [(needles, False) for needles in args.needles]
    kinds += [(needles, True) for needles in args.alike]
    trials = [
        Trial(context, depth, needles, number, alike)
        for context in args.contexts
        for needles, alike in kinds
        for depth in args.depths
        for number in range(args.trials)
    ]
    left = [trial for trial in trials if trial not in done]
    with ThreadPoolExecutor(args.parallel) as pool:
        asked = pool.map(lambda trial: (trial, ask(server, trial, haystack)), left)
        for trial, found in tqdm(asked, total=len(left), unit="trial"):
            answer = asdict(trial)
            if not trial.alike:
                del answer["alike"]  # as it was before there were such needles
            kept.add(variant | answer | {"found": found})
    args.output.write_text(json.dumps(summarize(kept.answers), indent=1) + "\n")


if __name__ == "__main__":
    main()
