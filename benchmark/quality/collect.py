"""All results of one model in one file, each with what it was measured on:

    python benchmark/quality/collect.py niah.json perplexity.json recall.json --model scripts/mini_dsa/checkpoint \
        --device "NVIDIA H100 80GB HBM3" --versions sglang=0.5.17 torch=2.11.0 --date 2026-11-25 --output quality.json

What the file holds already stays, but for what was measured again. Results of other weights are refused.
"""

import argparse
import datetime
import hashlib
import json
from pathlib import Path
from typing import Dict, List

from results import read

# What a record says beside what it is about.
VALUES = ("value", "ci95", "n", "device", "versions", "date", "model")


def fingerprint(model: Path) -> str:
    """The SHA-256 of a checkpoint's weights, all files in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def about(record: Dict) -> str:
    return json.dumps({k: v for k, v in sorted(record.items()) if k not in VALUES})


def merge(kept: List[Dict], records: List[Dict]) -> List[Dict]:
    """`records` in the place of those kept that are about the same, or behind them.

    Raises:
        ValueError: they are of different weights.
    """
    if len({record["model"] for record in kept + records}) > 1:
        raise ValueError("the results are of different weights")
    return list({about(record): record for record in kept + records}.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", type=Path, nargs="+", help="JSON files of niah, perplexity, recall")
    add("--model", type=Path, required=True, help="the folder of the checkpoint")
    add("--device", required=True, help="what the servers ran on")
    add("--versions", nargs="+", required=True, metavar="NAME=VERSION")
    add("--date", default=datetime.date.today().isoformat(), help="of measurement")
    add("--output", type=Path, required=True)
    args = parser.parse_args()
    measured = {
        "device": args.device,
        "versions": dict(version.split("=", 1) for version in args.versions),
        "date": args.date,
        "model": fingerprint(args.model),
    }
    records = [record | measured for record in read(args.results)]
    kept = read([args.output]) if args.output.exists() else []
    try:
        merged = merge(kept, records)
    except ValueError as error:
        parser.error(f"{args.output}: {error}")
    args.output.write_text(json.dumps(merged, indent=1) + "\n")


if __name__ == "__main__":
    main()
