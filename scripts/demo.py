"""A MISA server on mini-DSA, asked for two numbers that a long text hides. Run by scripts/demo.sh."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Dict, List

from mini_dsa.tasks import asked, told

from sglang.srt.layers.misa.testing.recall import share_of_dsa
from sglang_misa.client import Client
from sglang_misa.server import serve

CHECKPOINT = Path(__file__).parent / "mini_dsa" / "checkpoint"
# What is told, how deep in the text, and what is asked for at its end.
NEEDLES = (
    ("bakodi", "7391642", 0.2),
    ("serupa", "2085517", 0.6),
)
ANSWER_TOKENS = 9


def haystack(characters: int) -> str:
    """The beginning of Python's own documentation, as pydoc has it, with the needles in it."""
    text, done = "".join(topics.values())[:characters], 0
    parts = []
    for key, number, depth in NEEDLES:
        place = int(depth * len(text))
        parts += [text[done:place], told("magic", key, number)]
        done = place
    return "".join([*parts, text[done:]])


def ask(server: Client, prompt: str) -> Dict:
    """A completion: its text, the seconds to the first token and the usage that the server states."""
    start = time.perf_counter()
    answer = {"text": "", "seconds": None, "usage": None}
    for event in server.stream(prompt, ANSWER_TOKENS):
        if answer["seconds"] is None:
            answer["seconds"] = time.perf_counter() - start
        answer["text"] += "".join(choice["text"] for choice in event["choices"])
        answer["usage"] = event.get("usage") or answer["usage"]
    return answer


def overlap(records: List[Dict], topk: int, rows: int = 32) -> float:
    """The share of DSA's selection that was selected, over the last `rows` queries of the prompt."""
    return share_of_dsa(of_prompt(records), topk, rows)


def of_prompt(records: List[Dict]) -> Dict:
    """The last record of a prompt; decode's have one row."""
    return [record for record in records if len(record["q"]) > 1][-1]


def report(answer: Dict, number: str, records: List[Dict], topk: int) -> bool:
    """Print what came of a question; whether it was answered."""
    usage, right = answer["usage"], answer["text"].strip().startswith(number)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    print(f"  answer               {answer['text'].strip()}")
    print(f"  that was told        {number}: {'found' if right else 'NOT FOUND'}")
    print(f"  prompt tokens        {usage['prompt_tokens']}, {cached} of them cached")
    print(f"  time to first token  {answer['seconds']:.2f} s (recording the indexer)")
    print("  layer  heads of the prompt's last query    overlap with DSA")
    for layer in sorted({record["layer_id"] for record in records}):
        own = [record for record in records if record["layer_id"] == layer]
        active = of_prompt(own)["heads"]
        heads = (
            f"all {own[-1]['q'].shape[1]}"
            if active is None
            else " ".join(f"{head:2}" for head in active[-1].tolist())
        )
        print(f"  {layer:5}  {heads:33}  {overlap(own, topk):.1%}")
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=CHECKPOINT,
        help="the checkpoint of a model whose tokens are bytes",
    )
    add("--characters", type=int, default=5000, help="length of the text")
    add("--dsa", action="store_true", help="ask DSA, without --enable-misa")
    add("server_args", nargs="*", help="further arguments of SGLang, after --")
    args = parser.parse_args()
    topk = json.loads((args.model / "config.json").read_text())["index_topk"]
    text = haystack(args.characters)
    # What the indexer does is recorded outside of CUDA graphs, and as positions.
    server_args = [] if args.dsa else ["--enable-misa"]
    # Room for the text, the question and an answer: SGLang lets a prompt that barely fits wait for ever.
    server_args += ["--max-total-tokens", str(len(text.encode()) + 4096)]
    server_args += ["--disable-cuda-graph", "--enable-cache-report", *args.server_args]
    env = {
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "SGLANG_DSA_FUSE_TOPK": "false",
    }
    print(f"Starting: sglang.launch_server {' '.join(server_args)} ...", flush=True)
    start, right = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as directory:
        with serve(args.model, Path(directory), *server_args, env=env) as server:
            print(f"The server is up after {time.perf_counter() - start:.0f} s.")
            for key, number, depth in NEEDLES:
                print(
                    f"\nPython's documentation, {len(text)} characters of it, and {depth:.0%} of the way in: "
                    f"{told('magic', key, number).strip()!r}. Then: {asked('magic', key).strip()!r}",
                    flush=True,
                )
                server.forget()
                answer = ask(server, text + asked("magic", key))
                right.append(report(answer, number, server.records(), topk))
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
