"""Results of several runs in one file."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmark" / "quality"


def result(value, **fields):
    about = {"variant": "dsa", "context": 4096, "metric": "niah", "depth": 0} | fields
    return about | {"value": value, "ci95": 0.1, "n": 4}


def test_results_join(tmp_path):
    model, output = tmp_path / "model", tmp_path / "all.json"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")

    def collect(*results):
        (tmp_path / "some.json").write_text(json.dumps(results))
        command = [sys.executable, BENCHMARK / "collect.py", tmp_path / "some.json"]
        command += ["--model", model, "--output", output, "--device", "a GPU"]
        command += ["--versions", "sglang=0.5.17", "torch=2.11.0"]
        return subprocess.run(command, stderr=subprocess.PIPE, text=True)

    assert collect(result(0.5), result(0.6, depth=10)).returncode == 0
    assert collect(result(0.7), result(0.8, variant="misa")).returncode == 0
    found = json.loads(output.read_text())
    assert [(r["variant"], r["depth"], r["value"]) for r in found] == [
        ("dsa", 0, 0.7),
        ("dsa", 10, 0.6),
        ("misa", 0, 0.8),
    ]
    versions = {"sglang": "0.5.17", "torch": "2.11.0"}
    assert all(r["device"] == "a GPU" and r["versions"] == versions for r in found)

    (model / "model.safetensors").write_bytes(b"other weights")
    refused = collect(result(0.9))
    assert refused.returncode and "of different weights" in refused.stderr
    assert json.loads(output.read_text()) == found
