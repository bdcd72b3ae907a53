"""mini-DSA: the model agrees with itself in all its modes, the tasks can be solved, and a short training runs."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
import train_mini_dsa
from mini_dsa import model as mini_dsa_model
from mini_dsa.model import Config, MiniDsa
from mini_dsa.tasks import TASKS, make_sequence
from mini_dsa.tokenizer import write_tokenizer
from tiny_model import make_weights

CONFIG = Config(num_hidden_layers=2, num_attention_heads=4, index_topk=256)
GLM = replace(CONFIG, family="glm_moe_dsa", index_n_heads=32, nextn=True)


def save_random(config, folder):
    """Random weights of a realistic scale: the model's own first ones would hide what attention does."""
    model = MiniDsa(config)
    model.load_state_dict(make_weights(config.to_json(), seed=0))
    model.save(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random(CONFIG, tmp_path_factory.mktemp("mini_dsa"))


@pytest.fixture(scope="module")
def glm_checkpoint(tmp_path_factory):
    return save_random(GLM, tmp_path_factory.mktemp("glm"))


def random_tokens(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [CONFIG, GLM], ids=lambda config: config.family)
def test_saved_model_is_the_same(config, checkpoint, glm_checkpoint):
    model = MiniDsa.load(glm_checkpoint if config.nextn else checkpoint)
    assert model.config == config
    saved = make_weights(config.to_json(), seed=0)
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


@torch.no_grad()
def test_some_chunks_attend_sparsely(checkpoint, monkeypatch):
    """In the last layer, where the next one does not mix them again."""
    monkeypatch.setattr(mini_dsa_model, "CHUNK", 64)
    model, prompt = MiniDsa.load(checkpoint), random_tokens(1, 640)
    layer, x = model.layers[-1], model.model.embed_tokens(prompt)
    positions = torch.arange(640)
    dense, sparse, mixed = (
        layer(x, positions, *mode)[0][0].split(64)
        for mode in (("dense",), ("sparse",), ("sparse", 0.5))
    )
    kinds = [
        (torch.equal(a, mix), torch.allclose(b, mix, atol=1e-5))
        for a, b, mix in zip(dense, sparse, mixed)
    ]
    # Before 256 tokens there is nothing to select.
    assert all(any(kind) for kind in kinds)
    assert {(True, False), (False, True)} <= set(kinds[4:])
    assert sum(not as_dense for as_dense, _ in kinds) <= 5


def test_indexer_loss_in_parts_is_the_same(checkpoint, monkeypatch):
    model, prompt = MiniDsa.load(checkpoint), random_tokens(2, 300)
    found = []
    for scores in (mini_dsa_model.SCORES, 64 * 300 * 100):
        monkeypatch.setattr(mini_dsa_model, "SCORES", scores)
        torch.manual_seed(0)
        _, loss = model(prompt, "warm-up")
        loss.backward()
        grads = [
            parameter.grad
            for name, parameter in model.named_parameters()
            if ".indexer." in name
        ]
        found.append([loss.detach(), *grads])
        model.zero_grad()
    for whole, parts in zip(*found):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_twice_as_wide_it_computes_the_same(glm_checkpoint, tmp_path):
    command = [sys.executable, "-m", "mini_dsa.widen", glm_checkpoint, tmp_path / "wide"]  # fmt: skip
    subprocess.run(command, cwd=SCRIPTS, check=True)
    prompt, found = random_tokens(1, 400), []
    for folder in (glm_checkpoint, tmp_path / "wide"):
        model = MiniDsa.load(folder)
        hidden, _ = model(prompt[:, :-1])
        drafted, _ = model.draft(prompt[:, 1:], hidden)
        found.append((model.lm_head(hidden), model.lm_head(drafted)))
    assert model.config.hidden_size == 2 * GLM.hidden_size
    assert (tmp_path / "wide" / "tokenizer.json").exists()
    for narrow, wide in zip(*found):
        torch.testing.assert_close(wide, narrow, atol=1e-3, rtol=1e-3)


def test_nextn_layer_learns_alone(glm_checkpoint):
    """What it is trained with is not to change the model."""
    model, prompt = MiniDsa.load(glm_checkpoint), random_tokens(1, 300)
    hidden, _ = model(prompt[:, :-1], "dense")
    drafted, loss = model.draft(prompt[:, 1:], hidden, "warm-up")
    (drafted.sum() + loss).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("model.layers.2."), name


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
    options = "--steps 20 2 2 2 2 2 --layers 2 --index-topk 64 --longest 256 --batch-bytes 512 --workers 0 --no-compile"
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


TINY = "--layers 1 --index-topk 32 --longest 256 --batch-bytes 512 --no-compile"


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains in this process: train(folder, options) -> the folder."""
    (tmp_path / "train.txt").write_bytes((SCRIPTS.parent / "LICENSE").read_bytes())
    (tmp_path / "corpus.json").write_text("{}")

    def run(folder, options):
        command = ["train", "--corpus", str(tmp_path), "--out", str(tmp_path / folder)]
        monkeypatch.setattr(sys, "argv", [*command, *TINY.split(), *options.split()])
        train_mini_dsa.main()
        return tmp_path / folder

    return run


def test_training_resumes(train, monkeypatch):
    """Broken off in the middle of a phase it goes on there, and ends with the weights of a training that was not.

    Its sequences are made by as many processes as one likes.
    """
    monkeypatch.setattr(train_mini_dsa, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(mini_dsa_model, "CHUNK", 64)
    monkeypatch.setattr(mini_dsa_model, "SCORES", 32 * 256 * 100)
    options = "--curriculum 32k-to-128k --family glm_moe_dsa --nextn --steps 1 1 4 1 2"
    whole = train("whole", f"{options} --workers 0")

    calls, losses = [], train_mini_dsa.losses

    def broken_off(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return losses(*args)

    monkeypatch.setattr(train_mini_dsa, "losses", broken_off)
    with pytest.raises(KeyboardInterrupt):
        train("parts", f"{options} --workers 0")
    train("parts", f"{options} --workers 1 --resume")
    assert len(calls) == 1 + 1 + 1 + 4 + 1 + 2
    # It pauses after a step; nothing else has saved that.
    monkeypatch.setattr(train_mini_dsa, "SAVE_EVERY", 1e9)
    paused = train("paused", f"{options} --workers 0 --pause 0")
    assert (paused / "training.pt").exists() and not (paused / "config.json").exists()
    train("paused", f"{options} --workers 0 --resume")

    folders = whole, whole.with_name("parts"), paused
    for name in ("config.json", "model.safetensors"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
    logs = [
        [
            {**json.loads(line), "seconds": 0}
            for line in (folder / "training.jsonl").read_text().splitlines()
        ]
        for folder in folders
    ]
    assert logs[0] == logs[1] == logs[2] and len(logs[0]) == 9
    assert {"drafts", "draft_kl"} <= logs[0][0].keys()
    assert MiniDsa.load(paused).config.max_position_embeddings == 256 + 1024


def test_training_starts_with_a_checkpoint(train):
    """Of the same family with all of it, of another one without its indexers, which have as many heads as they like."""
    first = train("first", "--steps 1 1 1 1 1 1 --workers 0")
    before = MiniDsa.load(first).state_dict()
    for family in ("deepseek_v32", "glm_moe_dsa"):
        heads = {"deepseek_v32": 64, "glm_moe_dsa": 32}[family]
        model = MiniDsa(
            replace(
                MiniDsa.load(first).config,
                family=family,
                index_n_heads=heads,
                nextn=True,
            )
        )
        fresh = {name: x.clone() for name, x in model.state_dict().items()}
        train_mini_dsa.begin_with(model, first)
        for name, weight in model.state_dict().items():
            known = name in before and (heads == 64 or ".indexer." not in name)
            assert torch.equal(weight, before[name] if known else fresh[name]), name
    wider = MiniDsa(replace(CONFIG, num_hidden_layers=1, intermediate_size=512))
    with pytest.raises(ValueError, match="has shape"):
        train_mini_dsa.begin_with(wider, first)


def test_nextn_layer_is_trained_alone(train):
    """In the phase that is for it; a model without it has no such phase."""
    options = "--curriculum 32k-to-128k --workers 0"
    first = train("first", f"{options} --steps 1 1 1 1")
    wanted = f"{options} --nextn --start {first} --steps 3 1 1 1 1"
    seen = {}

    def end_phase(self):
        seen.setdefault("weights", {k: v.clone() for k, v in self.model.state_dict().items()})  # fmt: skip
        original(self)

    original = train_mini_dsa.Training.end_phase
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_mini_dsa.Training, "end_phase", end_phase)
        train("second", wanted)
    config = MiniDsa.load(first.with_name("second")).config
    torch.manual_seed(0)  # the --seed
    fresh = MiniDsa(config)
    train_mini_dsa.begin_with(fresh, first)
    for name, before in fresh.state_dict().items():
        alone = name.startswith("model.layers.1.") and ".indexer." not in name
        changed = not torch.equal(before, seen["weights"][name])
        assert changed == (alone and "correction_bias" not in name), name


def test_steps_of_each_phase(train, capsys):
    with pytest.raises(SystemExit):
        train("never", "--curriculum 128k --steps 1 2 3")
    assert "128k has 9 phases" in capsys.readouterr().err


def test_shares_are_of_the_whole():
    for name, phases in train_mini_dsa.CURRICULA.items():
        assert sum(phase.share for phase in phases) == pytest.approx(1), name
        assert len({phase.name for phase in phases}) == len(phases)
