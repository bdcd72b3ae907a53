"""The command line of the scripts here that draw results."""

import argparse
import json
from pathlib import Path
from typing import Callable, Dict, List


def main(
    description: str, example: str, draw: Callable[[List[Dict], Path], None]
) -> None:
    """Draw the records of the file that the command line names, by default into a PNG beside it.

    Args:
        example: what such a file is called.
        draw: draws records into a PNG.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("json", type=Path, help=example)
    parser.add_argument("--output", type=Path, help="default: the same name, .png")
    args = parser.parse_args()
    output = args.output or args.json.with_suffix(".png")
    draw(json.loads(args.json.read_text()), output)
    print(f"wrote {output}")
