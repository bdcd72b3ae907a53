"""mini-DSA in SGLang: its log-probabilities and selections, what its NextN layer drafts, and the attention that a server records,
are the model's, in both families.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mini_dsa.model import Attention, Config, MiniDsa, index_scores
from mini_dsa.tokenizer import write_tokenizer
from recall import dense_attention
from tiny_model import make_weights

from sglang.srt.layers.misa.evaluation.capture import ATTENTION_STRIDE
from sglang_misa.server import chain, serve, tokens

BENCHMARK = Path(__file__).parents[2] / "benchmark" / "quality"
TOPK = 256
CONFIG = Config(num_hidden_layers=2, num_attention_heads=4, index_topk=TOPK)
GLM = replace(CONFIG, family="glm_moe_dsa", index_n_heads=32, nextn=True)
DRAFTS = 2

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="its index_topk is the CPU engine's alone"
    ),
    # One worker runs all the tests of a server.
    pytest.mark.xdist_group("mini-dsa"),
]


def random_model(config):
    """Random weights of a realistic scale: the model's own first ones would hide what attention does."""
    model = MiniDsa(config)
    model.load_state_dict(make_weights(config.to_json(), seed=0))
    return model


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def glm():
    return random_model(GLM)


def serve_model(model, folder, *args):
    model.save(folder)
    write_tokenizer(folder)
    return serve(folder, folder, *args)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serve_model(model, tmp_path_factory.mktemp("mini_dsa")) as running:
        yield running


@torch.no_grad()
def test_server_computes_the_same(model, server):
    check_prompt(model, server)


@torch.no_grad()
def test_glm_and_its_drafts(glm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("glm")
    with serve_model(glm, folder, *chain(DRAFTS)) as server:
        check_prompt(glm, server)
        check_draft_keys(glm, server)
        check_drafts(glm, server)


def check_draft_keys(model, server):
    """What the NextN layer's indexer keeps of a prompt: it has read the same tokens, at the same positions."""
    prompt = tokens(300, 1)
    server.reset()
    server.generate(prompt, 1)
    (record,) = [r for r in server.records() if r["draft"] and not r["decode"]]
    count = len(prompt) - 1  # the last one's is of the token that was generated
    inputs = torch.tensor([prompt])
    layer, positions = model.nextn, torch.arange(count)
    hidden, _ = model(inputs[:, :-1], "dense")
    parts = layer.enorm(model.model.embed_tokens(inputs[:, 1:])), layer.hnorm(hidden)
    x = layer.input_layernorm(layer.eh_proj(torch.cat(parts, dim=-1)))
    expected = layer.self_attn.indexer.keys(x, positions)[0]
    served = (record["k"].float() * record["k_scale"][:, None])[:count]
    difference = (served - expected).norm() / expected.norm()
    print(f"keys of the NextN layer differ by {difference:.3f}")
    assert difference < 0.05
    shifted = (served[1:] - expected[:-1]).norm() / expected.norm()
    assert shifted > 0.5


def check_drafts(model, server):
    """As many of them are right as the model would get right that drafts in the same way."""
    count = 48
    for seed in range(2):
        prompt = tokens(100, seed)
        answer = server.generate(prompt, count)
        text = prompt + answer["output_ids"]
        hidden, _ = model(torch.tensor([text]), "dense")
        known, found = len(prompt) + 1, 0
        while known < len(text):
            read, before = text[1:known], hidden[:, : known - 1]
            for _ in range(DRAFTS):
                drafted, _ = model.draft(torch.tensor([read]), before, "dense")
                read = read + [int(model.lm_head(drafted[:, -1]).argmax())]
                before = torch.cat([before, drafted[:, -1:]], dim=1)
            same = 0
            for draft, token in zip(read[known - 1 :], text[known:]):
                if draft != token:
                    break
                same += 1
            found, known = found + same, known + same + 1
        served = answer["meta_info"]["spec_num_correct_drafts"]
        print(f"{served} drafts were right, {found} of the model's")
        assert abs(served - found) <= 2 and found > 5
        assert found < count * DRAFTS // (DRAFTS + 1)  # some were wrong


def check_prompt(model, server):
    """A prompt's log-probabilities, and what the first layer selects for it."""
    prompt = tokens(1500)
    server.reset()
    server.set_chunk(8192)
    answer = server.generate(prompt, 1, return_logprob=True, logprob_start_len=0)
    records = [r for r in server.records() if len(r["q"]) > 1 and not r["draft"]]
    served = [row[0] for row in answer["meta_info"]["input_token_logprobs"][1:]]

    inputs = torch.tensor([prompt])
    logprobs = model.logits(inputs).log_softmax(-1)[0, :-1]
    ours = logprobs.gather(-1, inputs[0, 1:, None])[:, 0]
    difference = (ours - torch.tensor(served)).abs()
    print(f"log-probabilities differ by {difference.mean():.4f} on average")
    # bfloat16 against float32.
    assert difference.mean() < 0.03

    # The first layer's selections, where nothing has been rounded before: FP8 keys against float32.
    (record,) = [r for r in records if r["layer_id"] == 0]
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(inputs))
    attention = model.model.layers[0].self_attn
    latent = attention.q_a_layernorm(attention.q_a_proj(x))
    q, k, weights = attention.indexer(x, latent, torch.arange(len(prompt)))
    rows = dict(zip(record["lengths"].tolist(), record["positions"]))
    for length in range(300, len(prompt), 100):
        at = slice(length - 1, length)
        scores = index_scores(q[:, at], weights[:, at], k[:, :length])[0, 0]
        expected = set(scores.topk(TOPK).indices.tolist())
        share = len(expected & set(rows[length].tolist())) / TOPK
        assert share > 0.9, f"{length} tokens: {share:.1%} of the selection"


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


def test_recorded_attention(model, server, tmp_path, monkeypatch):
    length = 1100
    prompts = {name: tokens(length, seed) for seed, name in enumerate("ab")}
    server.reset()
    server.set_chunk(512)
    for name, prompt in prompts.items():
        server.generate(prompt, 3, rid=name)

    expected = {
        name: models_attention(model, prompt, monkeypatch)
        for name, prompt in prompts.items()
    }
    seen = {(name, layer): set() for name in "ab" for layer in range(2)}
    for path in server.capture_dir.glob("*.attention"):
        record, attention = torch.load(path.with_suffix(".pt")), torch.load(path)
        name, layer = record["rid"], record["layer_id"]
        lengths = attention["lengths"]
        seen[name, layer] |= set(lengths.tolist())
        found = dense_attention(attention, lengths)
        wanted = expected[name][layer][lengths - 1, : found.shape[1]]
        # The server computes in bfloat16; what the second layer sees went through FP8's selection too.
        difference = (found - wanted).abs().sum(1) / 2
        print(f"layer {layer}: off by {difference.mean():.4f}, {difference.max():.4f}")
        assert difference.mean() < (0.005, 0.03)[layer]
        # Neighbouring rows attend otherwise.
        assert (found[:-1] - wanted[1:]).abs().sum(1).min() / 2 > 0.3
    # Rows that see at most TOPK tokens are selected for too, in a chunk that has others.
    wanted = set(range(ATTENTION_STRIDE, length + 1, ATTENTION_STRIDE))
    assert all(lengths == wanted for lengths in seen.values())

    output = tmp_path / "recall.json"
    command = [sys.executable, BENCHMARK / "recall.py", server.capture_dir]
    command += ["--output", output, "--topk", str(TOPK), "--rows", "5"]
    subprocess.run(command, check=True)
    (dsa,) = [
        record
        for record in json.loads(output.read_text())
        if (record["variant"], record["metric"]) == ("dsa", "attention_mass")
    ]
    # Random weights: the indexer knows nothing of the attention, and finds what is spread evenly.
    assert dsa["n"] == 2 and TOPK / length < dsa["value"] < 0.9
