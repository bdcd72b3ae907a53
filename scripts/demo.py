"""A MISA server on a tiny random DeepSeek-V3.2, asked two questions about one long text. Run by scripts/demo.sh."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List

import requests

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "test" / "misa"))

from server import Server
from tiny_model import write_tiny_model

from sglang.srt.layers.misa import reference

QUESTIONS = (
    "\n\nQuestion: What does this text say about patents?\nAnswer:",
    "\n\nQuestion: Who may use the Work, and for what?\nAnswer:",
)


def ask(server: Server, prompt: str, new_tokens: int = 16) -> Dict:
    """Stream an answer; returns its text, its seconds to the first token and what SGLang says of it."""
    start = time.perf_counter()
    response = requests.post(
        server.url + "/generate",
        json={
            "text": prompt,
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens},
        },
        stream=True,
        timeout=600,
    )
    response.raise_for_status()
    events = (line for line in response.iter_lines() if line.startswith(b"data: {"))
    answer = json.loads(next(events)[len(b"data: ") :])
    seconds = time.perf_counter() - start
    for event in events:
        answer = json.loads(event[len(b"data: ") :])
    return {"seconds": seconds, **answer}


def overlap(records: List[Dict], topk: int, rows: int = 32) -> float:
    """The share of DSA's selection that MISA selects too, for the last `rows` queries of the prompt."""
    record = [record for record in records if len(record["q"]) > 1][-1]
    q, weights, lengths, positions = (
        record[name][-rows:] for name in ("q", "weights", "lengths", "positions")
    )
    dsa = reference.dsa(q, weights, record["k"], record["k_scale"], lengths, topk)
    shares = [
        len(set(ours) & set(theirs)) / topk
        for ours, theirs in zip(positions.tolist(), dsa.tolist())
    ]
    return sum(shares) / len(shares)


def report(answer: Dict, records: List[Dict], topk: int) -> None:
    meta = answer["meta_info"]
    print(
        f"  prompt tokens        {meta['prompt_tokens']}, {meta['cached_tokens']} of them cached"
    )
    print(f"  time to first token  {answer['seconds']:.2f} s (recording the indexer)")
    print(f"  answer               {answer['text']!r}")
    print("  layer  active heads of the last query     heads used  overlap with DSA")
    for layer in sorted({record["layer_id"] for record in records}):
        own = [record for record in records if record["layer_id"] == layer]
        used = {head for record in own for head in record["heads"].unique().tolist()}
        heads = " ".join(f"{head:2}" for head in own[-1]["heads"][-1].tolist())
        total = own[0]["q"].shape[1]
        print(
            f"  {layer:5}  {heads:33}  {len(used):2} of {total}    {overlap(own, topk):.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--text",
        type=Path,
        default=ROOT / "LICENSE",
        help="a text of at least 8,000 bytes: a byte is a token",
    )
    parser.add_argument("--index-topk", type=int, default=2048)
    parser.add_argument(
        "server_args",
        nargs="*",
        default=["--enable-misa", "--disable-cuda-graph"],
        help="SGLang's arguments, after --",
    )
    args = parser.parse_args()
    text = args.text.read_text()
    with tempfile.TemporaryDirectory() as directory:
        print(
            "Writing a tiny DeepSeek-V3.2 with random weights: its answers are noise, and its heads agree on nothing.",
            flush=True,
        )
        model = Path(directory) / "model"
        write_tiny_model(model, index_topk=args.index_topk)
        print(
            f"Starting: sglang.launch_server {' '.join(args.server_args)} ...",
            flush=True,
        )
        start = time.perf_counter()
        env = {"OMP_NUM_THREADS": str(os.cpu_count())}
        with Server(model, Path(directory), *args.server_args, env=env) as server:
            print(
                f"The server is up after {time.perf_counter() - start:.0f} s.",
                flush=True,
            )
            for question in QUESTIONS:
                server.forget()
                answer = ask(server, text + question)
                print(
                    f"\n{args.text.name} ({len(text)} characters), then: {question.strip()!r}"
                )
                report(answer, server.records(), args.index_topk)


if __name__ == "__main__":
    main()
