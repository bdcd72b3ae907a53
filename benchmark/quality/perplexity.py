"""Perplexity of long text through a running SGLang server, over context length:

    python benchmark/quality/perplexity.py --url http://127.0.0.1:30000 --text heldout.txt --output perplexity.json

The last `--scored` tokens of every window are scored, so that all of them have a long context. The windows of all context
lengths end at the same places: the same tokens are scored, with more or less of the text before them. Every variant gets the
same windows; "perplexity_ratio" is its perplexity over DSA's on the windows that both have. Answers are kept beside the
output, so a run that was broken off goes on, and several servers can be asked one after another into the same file.
"""

import argparse
import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Dict, List

from kept_answers import KeptAnswers
from results import Variant, ci95, show
from tqdm import tqdm

from sglang_misa.client import Client


def window_ends(tokens: int, longest: int, scored: int, windows: int) -> List[int]:
    """Where `windows` windows of up to `longest` tokens end in a text, evenly spread, none scoring what another does.

    Raises:
        ValueError: the text is too short.
    """
    needed = longest + (windows - 1) * scored
    if tokens < needed:
        raise ValueError(f"the text has {tokens} tokens, not {needed}")
    return [
        longest + i * (tokens - longest) // max(1, windows - 1) for i in range(windows)
    ]


def negative_log_likelihood(server: Client, window: List[int], scored: int) -> float:
    """The mean over the last `scored` tokens of a window, in nats."""
    answer = server.post(
        "/generate",
        input_ids=window,
        sampling_params={"max_new_tokens": 1, "temperature": 0},
        return_logprob=True,
        # The first token from here on has no log-probability.
        logprob_start_len=len(window) - scored - 1,
    )
    rows = answer.json()["meta_info"]["input_token_logprobs"][1:]
    if [token for _, token, *_ in rows] != window[-scored:]:
        raise RuntimeError("the server did not score the tokens that it was asked for")
    return -mean(logprob for logprob, *_ in rows)


def record(variant: Dict, context: int, metric: str, nlls: List[float]) -> Dict:
    """exp of the mean, and half the width of its 95% confidence interval by the delta method over windows."""
    value, error = math.exp(mean(nlls)), ci95(nlls)
    return variant | {
        "context": context,
        "metric": metric,
        "value": value,
        "ci95": None if error is None else value * error,
        "n": len(nlls),
    }


def summarize(answers: List[Dict]) -> List[Dict]:
    """The perplexity by variant and context, and its ratio to DSA's, paired by window; n counts windows."""
    cells: Dict[tuple, Dict[tuple, float]] = {}
    for answer in answers:
        cell = Variant.of(answer), answer["context"]
        window = answer["text"], answer["end"], answer["scored"]
        cells.setdefault(cell, {})[window] = answer["nll"]
    results = []
    for (variant, context), nlls in cells.items():
        fields = variant._asdict()
        results.append(record(fields, context, "perplexity", list(nlls.values())))
        dsa = cells.get((Variant("dsa"), context), {})
        both = [nll - dsa[window] for window, nll in nlls.items() if window in dsa]
        if both and fields["variant"] != "dsa":
            results.append(record(fields, context, "perplexity_ratio", both))
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", required=True, help="of the server")
    add("--text", type=Path, required=True, help="a long text, not trained on")
    add("--output", type=Path, required=True, help="the result, JSON")
    add("--contexts", type=int, nargs="+", default=[8192, 16384, 32768])
    add("--scored", type=int, default=2048, help="tokens at the end of a window")
    add("--windows", type=int, default=32, help="of every context")
    add("--parallel", type=int, default=4, help="requests at once")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if min(args.contexts) <= args.scored:
        raise SystemExit("perplexity: every context has to be longer than --scored")
    server = Client(args.url)
    text = args.text.read_text(errors="replace")
    tokens, first = server.tokenize(text), server.special_tokens()
    room = max(args.contexts) - len(first)
    try:
        ends = window_ends(len(tokens), room, args.scored, args.windows)
    except ValueError as error:
        raise SystemExit(f"perplexity: {args.text}: {error}")
    same = server.variant() | {
        "text": hashlib.sha256(text.encode()).hexdigest()[:12],
        "scored": args.scored,
    }
    kept = KeptAnswers(args.output)
    done = {(answer["context"], answer["end"]) for answer in kept.of(**same)}
    windows = [(context, end) for context in args.contexts for end in ends]
    left = [window for window in windows if window not in done]

    def score(window) -> Dict:
        context, end = window
        ids = first + tokens[end - context + len(first) : end]
        nll = negative_log_likelihood(server, ids, args.scored)
        return same | {"context": context, "end": end, "nll": nll}

    with ThreadPoolExecutor(args.parallel) as pool:
        for answer in tqdm(pool.map(score, left), total=len(left), unit="window"):
            kept.add(answer)
    results = summarize(kept.answers)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
