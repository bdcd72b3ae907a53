"""The attention that is recorded in a server is the model's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmark" / "quality"
from mini_dsa.model import Attention, Config, MiniDsa
from mini_dsa.tokenizer import write_tokenizer
from recall import dense_attention
from tiny_model import make_weights

from sglang.srt.layers.misa.evaluation.capture import ATTENTION_STRIDE, Recorder
from sglang_misa.server import serve, tokens

TOPK, LENGTH = 256, 1100


def models_attention(model, prompt, monkeypatch):
    """What every layer of the torch model attends to, averaged over its heads, if it attends to all: [layers, T, T]."""
    found = []

    def index_loss(self, q, k, *_):
        logits = q[0] @ k[0].transpose(1, 2) * q.shape[-1] ** -0.5
        hidden = torch.ones_like(logits[0]).triu(1).bool()
        found.append(logits.masked_fill(hidden, float("-inf")).softmax(-1).mean(0))
        return q.new_zeros(())

    monkeypatch.setattr(Attention, "index_loss", index_loss)
    with torch.no_grad():
        model(torch.tensor([prompt]), "sparse")
    return torch.stack(found)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="its index_topk is the CPU engine's alone"
)
def test_a_server(tmp_path, monkeypatch):
    config = Config(num_hidden_layers=2, num_attention_heads=4, index_topk=TOPK)
    model = MiniDsa(config)
    model.load_state_dict(make_weights(config.to_json(), seed=0))
    model.save(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    prompts = tokens(LENGTH), tokens(LENGTH, seed=1)
    options = "--chunked-prefill-size", "512"
    with serve(tmp_path / "model", tmp_path, *options) as server:
        for name, prompt in zip("ab", prompts):
            server.generate(prompt, 3, rid=name)
        capture = server.capture_dir

    expected = {
        name: models_attention(model, prompt, monkeypatch)
        for name, prompt in zip("ab", prompts)
    }
    seen = {(name, layer): set() for name in "ab" for layer in range(2)}
    for path in capture.glob("*.attention"):
        record, attention = torch.load(path.with_suffix(".pt")), torch.load(path)
        name, layer = record["rid"], record["layer_id"]
        lengths = attention["lengths"]
        seen[name, layer] |= set(lengths.tolist())
        found = dense_attention(attention, lengths)
        tokens_seen = found.shape[1]
        wanted = expected[name][layer][lengths - 1, :tokens_seen]
        # The server computes in bfloat16; what the second layer sees went through FP8's selection too.
        difference = (found - wanted).abs().sum(1) / 2
        print(f"layer {layer}: off by {difference.mean():.4f}, {difference.max():.4f}")
        assert difference.mean() < (0.005, 0.03)[layer]
        # Neighbouring rows attend otherwise.
        assert (found[:-1] - wanted[1:]).abs().sum(1).min() / 2 > 0.3
    # Rows that see at most TOPK tokens are selected for too, in a chunk that has others.
    wanted = set(range(ATTENTION_STRIDE, LENGTH + 1, ATTENTION_STRIDE))
    assert all(lengths == wanted for lengths in seen.values())

    output = tmp_path / "recall.json"
    command = [sys.executable, BENCHMARK / "recall.py", capture, "--output", output]
    subprocess.run([*command, "--topk", str(TOPK), "--rows", "5"], check=True)
    (dsa,) = [
        record
        for record in json.loads(output.read_text())
        if (record["variant"], record["metric"]) == ("dsa", "attention_mass")
    ]
    # Random weights: the indexer knows nothing of the attention, and finds what is spread evenly.
    assert dsa["n"] == 2 and TOPK / LENGTH < dsa["value"] < 0.9


def test_attention_goes_with_its_own_rows(tmp_path):
    """Rows that the indexer did not select for leave nothing, though the request has left a record before."""
    recorder = Recorder(str(tmp_path))
    table = torch.arange(4)
    rows = {"layer_id": 1, "rid": "a", "page_table": table}
    recorder.record(
        **rows,
        decode=False,
        router=None,
        q=torch.zeros(3, 2, 128),
        weights=torch.zeros(3, 2),
        lengths=torch.tensor([121, 122, 123]),
        index_k=torch.zeros(4, 64 * 132, dtype=torch.uint8),
        pooled_keys=None,
        heads=None,
        shared_q=None,
        shared_scale=None,
        positions=torch.zeros(3, 128),
    )
    latent = torch.randn(256, 1, 16)
    given = {"q": torch.randn(3, 2, 16), "latent": latent, "scaling": 0.5}
    recorder.record_attention(**rows, **given, lengths=torch.tensor([60, 61, 62]))
    assert not list(tmp_path.glob("*.attention"))
    recorder.record_attention(**rows, **given, lengths=torch.tensor([121, 122, 123]))
    (path,) = tmp_path.glob("*.attention")
    assert path.with_suffix(".pt").exists()
    record = torch.load(path)
    assert record["lengths"].tolist() == [122]
    assert torch.equal(record["q"], given["q"][1:2])
    assert torch.equal(record["k"], latent[:122, 0])
