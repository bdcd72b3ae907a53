"""Answers kept beside a result, so that a run which was broken off goes on."""

import json
from pathlib import Path
from typing import Dict, List


class KeptAnswers:
    """The answers so far, one JSON a line in the `.jsonl` beside the result; those of several servers may be in one file."""

    def __init__(self, output: Path):
        self.path = output.with_suffix(".jsonl")
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.answers: List[Dict] = [json.loads(line) for line in lines]

    def of(self, **fields) -> List[Dict]:
        """The answers that have these fields."""
        return [answer for answer in self.answers if answer | fields == answer]

    def add(self, answer: Dict) -> None:
        self.answers.append(answer)
        with self.path.open("a") as file:
            file.write(json.dumps(answer) + "\n")
