"""Perplexity of long text through a running SGLang server, over context length:

    python benchmark/quality/perplexity.py --url http://127.0.0.1:30000 --text heldout.txt --output perplexity.json

The last `--scored` tokens of every window are scored, so that all of them have a long context. The windows of all context
lengths end at the same places: the same tokens are scored, with more or less of the text before them. Every variant gets the
same windows; "perplexity_ratio" is its perplexity over DSA's on the windows that both have. Answers are kept beside the
output, so a run that was broken off goes on, and several servers can be asked one after another into the same file.

With --new-tokens, a server with speculative decoding goes on with every window: "accept_length" is how many tokens a step gives it
on average, the model's own among them.
"""

import argparse
import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Dict, List, Sequence

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


def ask(
    server: Client, window: List[int], scored: int, new_tokens: int
) -> Dict[str, float]:
    """What a window gives: "nll", the mean over its last `scored` tokens, in nats; "accept_length" if there are to be new tokens."""
    answer = server.generate(
        window,
        new_tokens or 1,
        return_logprob=True,
        # The first token from here on has no log-probability.
        logprob_start_len=len(window) - scored - 1,
    )["meta_info"]
    rows = answer["input_token_logprobs"][1:]
    if [token for _, token, *_ in rows] != window[-scored:]:
        raise RuntimeError("the server did not score the tokens that it was asked for")
    found = {"nll": -mean(logprob for logprob, *_ in rows)}
    if new_tokens:
        found["accept_length"] = answer["spec_accept_length"]
    return found


def record(fields: Dict, context: int, metric: str, values: Sequence[float]) -> Dict:
    """The mean, and half the width of its 95% confidence interval over windows."""
    return fields | {
        "context": context,
        "metric": metric,
        "value": mean(values),
        "ci95": ci95(values),
        "n": len(values),
    }


def exponential(of: Dict) -> Dict:
    """The record of exp of a mean; its interval by the delta method."""
    value, error = math.exp(of["value"]), of["ci95"]
    return of | {"value": value, "ci95": None if error is None else value * error}


def summarize(answers: List[Dict]) -> List[Dict]:
    """The perplexity by variant and context, and its ratio to DSA's, paired by window; n counts windows.

    Behind them what drafts were worth: `drafts` are those of a step.
    """
    cells: Dict[tuple, Dict[tuple, float]] = {}
    drafted: Dict[tuple, Dict[tuple, float]] = {}
    for answer in answers:
        cell = Variant.of(answer), answer["context"]
        window = answer["text"], answer["end"], answer["scored"]
        cells.setdefault(cell, {})[window] = answer["nll"]
        if "accept_length" in answer:
            cell += answer["drafts"], answer["new_tokens"]
            drafted.setdefault(cell, {})[window] = answer["accept_length"]
    results = []
    for (variant, context), nlls in cells.items():
        fields = variant._asdict()
        whole = record(fields, context, "perplexity", list(nlls.values()))
        results.append(exponential(whole))
        dsa = cells.get((Variant("dsa"), context), {})
        both = [nll - dsa[window] for window, nll in nlls.items() if window in dsa]
        if both and fields["variant"] != "dsa":
            ratio = record(fields, context, "perplexity_ratio", both)
            results.append(exponential(ratio))
    for (variant, context, drafts, new_tokens), lengths in drafted.items():
        fields = variant._asdict() | {"drafts": drafts, "new_tokens": new_tokens}
        results.append(record(fields, context, "accept_length", list(lengths.values())))
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
    add(
        "--new-tokens",
        type=int,
        default=0,
        help="behind every window, by speculative decoding; none by default",
    )
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
    if args.new_tokens:
        if not (draft_tokens := server.info.get("speculative_num_draft_tokens")):
            raise SystemExit("perplexity: --new-tokens: the server drafts nothing")
        same |= {"drafts": draft_tokens - 1, "new_tokens": args.new_tokens}
    kept = KeptAnswers(args.output)
    done = {(answer["context"], answer["end"]) for answer in kept.of(**same)}
    windows = [(context, end) for context in args.contexts for end in ends]
    left = [window for window in windows if window not in done]

    def score(window) -> Dict:
        context, end = window
        ids = first + tokens[end - context + len(first) : end]
        found = ask(server, ids, args.scored, args.new_tokens)
        return same | {"context": context, "end": end} | found

    with ThreadPoolExecutor(args.parallel) as pool:
        for answer in tqdm(pool.map(score, left), total=len(left), unit="window"):
            kept.add(answer)
    results = summarize(kept.answers)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
