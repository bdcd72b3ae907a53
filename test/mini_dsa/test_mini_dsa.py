"""mini-DSA: the model agrees with itself in all its modes, the tasks can be solved, and a short training runs."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
from mini_dsa.model import Config, MiniDsa
from mini_dsa.tasks import TASKS, make_sequence
from mini_dsa.tokenizer import write_tokenizer
from tiny_model import make_weights

CONFIG = Config(num_hidden_layers=2, num_attention_heads=4, index_topk=256)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights of a realistic scale: the model's own first ones would hide what attention does."""
    folder = tmp_path_factory.mktemp("mini_dsa")
    model = MiniDsa(CONFIG)
    model.load_state_dict(make_weights(CONFIG.to_json(), seed=0))
    model.save(folder)
    write_tokenizer(folder)
    return folder


def random_tokens(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1))


def test_saved_model_is_the_same(checkpoint):
    model = MiniDsa.load(checkpoint)
    assert model.config == CONFIG
    saved = make_weights(CONFIG.to_json(), seed=0)
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[k], v.float()) for k, v in saved.items())


@torch.no_grad()
def test_all_modes_agree_while_every_token_is_selected(checkpoint):
    model, prompt = MiniDsa.load(checkpoint), random_tokens(2, CONFIG.index_topk)
    dense = model.logits(prompt, "dense")
    torch.testing.assert_close(model.logits(prompt, "warm-up"), dense)
    torch.testing.assert_close(model.logits(prompt, "sparse"), dense)


@torch.no_grad()
def test_sparse_attention_differs_beyond_topk(checkpoint):
    model, prompt = MiniDsa.load(checkpoint), random_tokens(1, 600)
    dense, sparse = model.logits(prompt, "dense"), model.logits(prompt, "sparse")
    topk = CONFIG.index_topk
    torch.testing.assert_close(sparse[:, :topk], dense[:, :topk])
    assert (sparse - dense)[:, topk:].abs().max() > 0.1


def test_indexer_loss_reaches_the_indexer_alone(checkpoint):
    model, prompt = MiniDsa.load(checkpoint), random_tokens(1, 300)
    _, loss = model(prompt, "sparse")
    assert loss > 0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".indexer." in name), name


def answers(sequence, mask):
    """Where the answers begin, and what they say."""
    begin = None
    for i, asked in enumerate([*mask, 0]):
        if asked and begin is None:
            begin = i
        elif not asked and begin is not None:
            yield begin, sequence[begin:i].strip(b" .;\n")
            begin = None


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_answers_were_told_before(task):
    for seed in range(50):
        statements = task(random.Random(seed))
        told = ""
        for statement in statements:
            told += statement.text
            answer = statement.answer.strip(" .;\n")
            assert answer in told
            told += statement.answer
        assert statements[-1].answer and not statements[0].answer


@pytest.mark.parametrize("length", [600, 2048, 16384])
def test_sequences(length):
    text = b"Nothing of this is asked for. " * 1000
    for seed in range(5):
        sequence, mask = make_sequence(random.Random(seed), text, length)
        assert (sequence, mask) == make_sequence(random.Random(seed), text, length)
        assert len(sequence) == len(mask) == length
        found = list(answers(sequence, mask))
        assert found or length < 2048
        for begin, answer in found:
            assert answer in sequence[:begin]


def test_training_runs(tmp_path):
    """Every phase takes its steps, something is learned of English letters, and the checkpoint can be read."""
    text = (SCRIPTS.parent / "LICENSE").read_bytes()
    (tmp_path / "train.txt").write_bytes(text)
    (tmp_path / "corpus.json").write_text("{}")
    command = [sys.executable, SCRIPTS / "train_mini_dsa.py"]
    options = "--steps 40 --layers 2 --index-topk 64 --longest 512 --batch-bytes 1024 --workers 0 --no-compile"
    paths = ["--corpus", tmp_path, "--out", tmp_path / "out"]
    # One thread: the tensors are small.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *options.split(), *paths], env=env, check=True)
    assert not (tmp_path / "out" / "training.pt").exists()
    log = (tmp_path / "out" / "training.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    assert len({record["phase"] for record in records}) == 6
    assert all(record["kl"] > 0 for record in records if record["phase"][:5] != "dense")
    text_losses = [record["text"] for record in records if "text" in record]
    assert mean(text_losses[-5:]) < text_losses[0] - 0.5
    model = MiniDsa.load(tmp_path / "out")
    assert model.logits(random_tokens(1, 100)).isfinite().all()


def test_training_resumes(tmp_path, monkeypatch):
    """Broken off in the third phase, it goes on there, with the weights that the second one has left."""
    import train_mini_dsa

    (tmp_path / "train.txt").write_bytes((SCRIPTS.parent / "LICENSE").read_bytes())
    (tmp_path / "corpus.json").write_text("{}")
    seen = []

    def train_phase(model, phase, *_):
        seen.append((phase.name, model.lm_head.weight.sum().item()))
        if len(seen) == 3:
            raise KeyboardInterrupt
        with torch.no_grad():
            model.lm_head.weight += 1

    monkeypatch.setattr(train_mini_dsa, "train_phase", train_phase)
    command = [
        "train",
        "--corpus",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--layers",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        train_mini_dsa.main()
    monkeypatch.setattr(sys, "argv", [*command, "--resume"])
    train_mini_dsa.main()
    names = [phase.name for phase in train_mini_dsa.PHASES]
    assert [name for name, _ in seen] == [*names[:3], *names[2:]]
    assert seen[3] == seen[2]
    assert MiniDsa.load(tmp_path / "out").config.num_hidden_layers == 1
