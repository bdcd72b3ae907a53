"""The evaluation of a model with one command, servers and all."""

import json
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_misa.server import reserved_port, server_env

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmark" / "quality" / "evaluate.py"
TOPK = 256
FILES = {
    "niah.json": {"niah"},
    "perplexity.json": {"perplexity", "perplexity_ratio"},
    "recall.json": {"recall", "attention_mass"},
}


def command_of(model, output, *options):
    command = [sys.executable, SCRIPT, "--model-path", model, "--output", output]
    return [*map(str, [*command, "--text", ROOT / "LICENSE", *options])]


def evaluate(model, output, *options, server_args=()):
    return subprocess.run(
        [*command_of(model, output, *options), "--", *server_args],
        env=server_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="its index_topk is the CPU engine's alone"
)
def test_variants_side_by_side(tiny_model, tmp_path):
    from sglang_cpu_engine.launch import FLAGS

    model, output = tiny_model("deepseek_v32", 2, TOPK), tmp_path / "quality"
    options = "--variants dsa misa --contexts 640 --depths 0 50 --trials 1 --windows 2 --scored 64 "
    options += f"--recall-prompts 2 --topk {TOPK} --suite"
    server_args = (*FLAGS, "--max-total-tokens", "16384", "--skip-server-warmup")
    with reserved_port() as port:
        server_args += ("--nccl-port", str(port + 1))
        options = *options.split(), "--port", port
        ran = evaluate(model, output, *options, server_args=server_args)
    assert ran.returncode == 0, ran.stdout
    found = {name: json.loads((output / name).read_text()) for name in FILES}
    for name, metrics in FILES.items():
        assert {record["metric"] for record in found[name]} == metrics
    for name in ("niah.json", "perplexity.json"):
        assert {record["variant"] for record in found[name]} == {"dsa", "misa"}
    # Rows that had to select were recorded, of both prompts.
    assert all(record["n"] == 2 for record in found["recall.json"])
    assert "| 640 tokens |" in (output / "table.md").read_text()
    assert not list(output.glob("*/")), "what was recorded is still there"


def test_what_cannot_be(tmp_path, monkeypatch):
    def refused(*options, model="model"):
        """What it ends with, run here: to import SGLang for each takes long."""
        command = [*command_of(model, tmp_path, *options), "--"]
        monkeypatch.setattr(sys, "argv", command[1:])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return str(ended.value)

    assert "no --contexts is longer than --scored" in refused("--contexts", "512")
    assert "RULER starts at 4096 tokens" in refused("--contexts", "3000")
    with reserved_port() as port:
        with socket.create_server(("127.0.0.1", port)):
            assert f"--port {port} is taken" in refused("--port", port)
        missing = refused("--port", port, model=tmp_path / "none")
    assert "evaluate: dsa: " in missing
    assert f"its log is {tmp_path / 'dsa.log'}" in missing
    assert "none" in (tmp_path / "dsa.log").read_text()
