"""Trains mini-DSA: dense attention, then the indexer, then both with the attention that the indexer selects.

    python scripts/mini_dsa/corpus.py corpus
    python scripts/train_mini_dsa.py --corpus corpus --out mini-dsa-32k --minutes 9.2

This is a model of 32K tokens. To one of 128K with a NextN layer, and to its sibling of GLM-5's shape, whose layers are the same and
whose indexers are trained anew:

    python scripts/train_mini_dsa.py --corpus corpus --out checkpoint --minutes 16 --nextn --no-compile \\
        --curriculum 32k-to-128k --start mini-dsa-32k
    python scripts/train_mini_dsa.py --corpus corpus --out checkpoint-glm --minutes 5 --nextn --no-compile \\
        --family glm_moe_dsa --curriculum indexer-128k --start checkpoint

or the first from nothing with `--curriculum 128k --minutes 25 --nextn`. `mini_dsa/checkpoint` and `mini_dsa/checkpoint-glm` come
from these three commands.

`<out>/training.jsonl` says how it went. With --resume, a training that was broken off goes on where it last saved its state, at
most a minute before, and one that paused (--pause) where it was. The data come in the same order whatever the clock does, so with
--steps every run gives the same weights, as far as the device's arithmetic does.

What the two trainings to 128K cost on one H200, of which other work had a share. Seconds a step are those of `training.jsonl`, behind
the first step of a phase, which takes up to 20 s where attention is sparse; steps are those to its last line of a phase. A step has 131,072
tokens, in the warm-ups of 8K and 32K 32,768. Work and memory are estimates for five layers, the NextN layer being one: a layer's
attention to all of 128K is 35 TFLOP, three and a half times as many with backward; the indexer's loss on 512 queries a layer writes
and reads their 2^32 scores of single heads, some sixteen passes of 8.6 GB; what an eighth of the queries selects takes four passes
of 700 GB in all. "GB" is the most memory, of which what backward needs was counted (165 MB for every 1,024 tokens).

    phase                   TFLOP   traffic    GB   seconds   steps
    in 16 minutes, 64 index heads
      nextn 8K                 22    0.2 TB    25      0.08     733
      dense 64K               310    0.1 TB    30      0.63     210
      joint 128K              625    0.8 TB    35      1.5      294
      warm-up 128K            180    0.7 TB    15      0.67     181
      sparse 128K (1/8)       800    4   TB    40      3.5       47
    in 5 minutes, 32 index heads
      warm-up 8K                                       0.06     542
      warm-up 32K                                      0.07     852
      warm-up 128K                                     0.55     202
      sparse 128K (1/8)                                2.8       24

The curriculum from nothing has not been run. In 25 minutes it would make some 3,000, 1,000 and 600 dense steps to 32K (0.05, 0.1 and
0.28 s each on an H100), 600 and 700 of the warm-ups to 32K, 180 dense ones of 64K, 330 joint, 240 warm-up and 60 sparse ones.
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from mini_dsa.model import Config, MiniDsa
from mini_dsa.tasks import make_sequence
from mini_dsa.tokenizer import write_tokenizer
from tiny_model import FAMILIES
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


@dataclass(frozen=True)
class Phase:
    """What is trained, and how.

    mode          "dense" trains all but the indexer, "warm-up" the indexer alone, "joint" both of them, with dense attention;
                  "sparse" both, with the attention that the indexer selects; "nextn" the NextN layer alone, but for its indexer
    length        bytes of a sequence
    batch         sequences of a step
    share         of the whole time, or of all steps
    lr            the highest learning rate; it falls to a tenth of it in the course of the phase
    sparse_share  of the queries that attend sparsely in mode "sparse"; the others attend to all
    """

    name: str
    mode: str
    length: int
    batch: int
    share: float
    lr: float
    sparse_share: float = 1.0


K = 1024
# The length grows once retrieval works at the one before.
CURRICULA = {
    "32k": (
        Phase("dense 2K", "dense", 2 * K, 64, 0.21, 2e-3),
        Phase("dense 8K", "dense", 8 * K, 16, 0.13, 1e-3),
        Phase("dense 32K", "dense", 32 * K, 4, 0.2, 7e-4),
        Phase("warm-up 8K", "warm-up", 8 * K, 4, 0.13, 1e-3),
        Phase("warm-up 32K", "warm-up", 32 * K, 1, 0.14, 5e-4),
        Phase("sparse 32K", "sparse", 32 * K, 1, 0.19, 3e-4),
    ),
    "128k": (
        Phase("dense 2K", "dense", 2 * K, 64, 0.1, 2e-3),
        Phase("dense 8K", "dense", 8 * K, 16, 0.07, 1e-3),
        Phase("dense 32K", "dense", 32 * K, 4, 0.11, 7e-4),
        Phase("warm-up 8K", "warm-up", 8 * K, 4, 0.05, 1e-3),
        Phase("warm-up 32K", "warm-up", 32 * K, 1, 0.06, 5e-4),
        Phase("dense 64K", "dense", 64 * K, 2, 0.08, 7e-4),
        Phase("joint 128K", "joint", 128 * K, 1, 0.31, 5e-4),
        Phase("warm-up 128K", "warm-up", 128 * K, 1, 0.09, 5e-4),
        Phase("sparse 128K", "sparse", 128 * K, 1, 0.13, 3e-4, 1 / 8),
    ),
    # From a model of 32K, whose NextN layer is new if it is to have one.
    "32k-to-128k": (
        Phase("nextn 8K", "nextn", 8 * K, 16, 0.07, 2e-3),
        Phase("dense 64K", "dense", 64 * K, 2, 0.14, 7e-4),
        Phase("joint 128K", "joint", 128 * K, 1, 0.46, 5e-4),
        Phase("warm-up 128K", "warm-up", 128 * K, 1, 0.13, 5e-4),
        Phase("sparse 128K", "sparse", 128 * K, 1, 0.2, 3e-4, 1 / 8),
    ),
    # From a model of 128K, for another family's indexer.
    "indexer-128k": (
        Phase("warm-up 8K", "warm-up", 8 * K, 4, 0.12, 1e-3),
        Phase("warm-up 32K", "warm-up", 32 * K, 1, 0.2, 5e-4),
        Phase("warm-up 128K", "warm-up", 128 * K, 1, 0.38, 5e-4),
        Phase("sparse 128K", "sparse", 128 * K, 1, 0.3, 3e-4, 1 / 8),
    ),
}
ANSWER_ROOM = K  # tokens that a model takes beyond the longest sequences
ANSWER_WEIGHT = 4.0  # of a byte of an answer; of any other, 1
STEPS_TO_LR = 100
LOG_EVERY = 5.0  # seconds; with --steps, every step is logged
SAVE_EVERY = 60.0  # seconds
COMPILED = (
    32 * K
)  # bytes of the longest sequences whose layers are compiled: longer ones do not need it


class Sequences(Dataset):
    """Endless sequences: tokens int64 [length + 1] and the mask of the answers, bool [length + 1].

    Each is a function of the seed and its number alone.
    """

    def __init__(self, text: bytes, length: int, seed: str):
        self.text, self.length, self.seed = text, length, seed

    def __getitem__(self, number: int) -> Tuple[Tensor, Tensor]:
        rng = random.Random(f"{self.seed} {number}")
        sequence, mask = make_sequence(rng, self.text, self.length + 1)
        tokens = torch.frombuffer(bytearray(sequence), dtype=torch.uint8)
        return tokens.long(), torch.frombuffer(mask, dtype=torch.uint8).bool()


def learning_rate(phase: Phase, step: int, progress: float) -> float:
    """progress: 0 to 1, how much of the phase is over."""
    falling = 0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return phase.lr * falling * min(1.0, (step + 1) / STEPS_TO_LR)


def trained(model: MiniDsa, mode: str) -> List[torch.nn.Parameter]:
    """The parameters that a mode trains."""
    part = model.nextn if mode == "nextn" else model
    return [
        parameter
        for name, parameter in part.named_parameters()
        if mode in ("joint", "sparse") or ("indexer." in name) == (mode == "warm-up")
    ]


def losses(
    model: MiniDsa, tokens: Tensor, mask: Tensor, phase: Phase
) -> Dict[str, Tensor]:
    """What is minimised ("total") and what is worth knowing: means over a batch of sequences.

    "answers" is the share of the answers' bytes that are the likeliest ones, "kl" the indexer's loss, "draft_kl" that of the
    NextN layer's indexer; "drafts" the share of the NextN layer's likeliest tokens that are the model's.
    """
    warm_up, nextn = phase.mode == "warm-up", model.config.nextn
    mode = {"joint": "warm-up", "nextn": "dense"}.get(phase.mode, phase.mode)
    hidden, kl = model(tokens[:, :-1], mode, phase.sparse_share)
    values = {"total": kl, "kl": kl}
    if nextn:
        drafted, draft_kl = model.draft(tokens[:, 1:], hidden, mode, phase.sparse_share)
        values |= {"total": kl + draft_kl, "draft_kl": draft_kl}
    if warm_up:
        return values
    logits, targets, asked = model.lm_head(hidden).float(), tokens[:, 1:], mask[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    weights = torch.where(asked.flatten(), ANSWER_WEIGHT, 1.0)
    right = (logits.argmax(-1) == targets)[asked]
    values["total"] = values["total"] + (each * weights).sum() / weights.sum()
    values["text"] = each[~asked.flatten()].mean()
    values["answers"] = right.float().sum() / max(1, right.numel())
    if nextn:
        # It is to say what the model is going to say; the last of its drafts is of a token behind the sequence.
        logits = logits[:, 1:].detach()
        drafts = F.linear(drafted[:, :-1], model.lm_head.weight.detach()).float()
        draft_loss = F.cross_entropy(
            drafts.flatten(0, 1), logits.softmax(-1).flatten(0, 1)
        )
        values["total"] = values["total"] + draft_loss
        same = drafts.argmax(-1) == logits.argmax(-1)
        values["drafts"] = same.float().mean()
    return values


class Paused(Exception):
    """The time of this run is over, that of the training is not; its state is saved."""


class Training:
    """A training in the folder `out`: its model, its log, and the state from which it goes on."""

    def __init__(self, model: MiniDsa, out: Path, resume: bool):
        self.model, self.out = model, out
        self.state = out / "training.pt"
        # Phases that are over; of the one that follows, if it has begun, its steps, its seconds and the optimizer's state.
        self.done, self.step, self.seconds = 0, 0, 0.0
        self.optimizer: Optional[dict] = None
        logged = 0
        if resume:
            saved = torch.load(self.state, map_location=model.lm_head.weight.device)
            model.load_state_dict(saved["model"])
            self.done, self.step = saved["done"], saved["step"]
            self.seconds, self.optimizer = saved["seconds"], saved["optimizer"]
            logged = saved["logged"]
        self.log = (out / "training.jsonl").open("a")
        self.log.truncate(logged)
        self.log.seek(logged)

    def save(self, step: int, seconds: float, optimizer: Optional[dict]) -> None:
        self.log.flush()
        saved = {
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "done": self.done,
            "step": step,
            "seconds": seconds,
            "logged": self.log.tell(),
        }
        # Never half of one.
        new = self.state.with_suffix(".new")
        torch.save(saved, new)
        os.replace(new, self.state)

    def end_phase(self) -> None:
        self.model.save(self.out)
        self.done, self.step, self.seconds, self.optimizer = self.done + 1, 0, 0.0, None
        self.save(0, 0.0, None)


def train_phase(
    training: Training, phase: Phase, text: bytes, budget: float, args
) -> None:
    """Train from where the training is to the end of the phase.

    budget: seconds of the phase, or steps; at least one step is made in any case.
    """
    model = training.model
    device = next(model.parameters()).device
    parameters = trained(model, phase.mode)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        parameters, betas=(0.9, 0.95), weight_decay=0.01, fused=device.type == "cuda"
    )
    if training.optimizer:
        optimizer.load_state_dict(training.optimizer)
    # The chunks of the other modes have too many shapes to be compiled, and are large enough not to need it.
    compiled = phase.mode in ("dense", "nextn") and phase.length <= COMPILED
    torch.compiler.set_stance("default" if compiled else "force_eager")
    torch.compiler.reset()  # there is a limit to the shapes that are compiled
    step, seed = training.step, f"{args.seed} {phase.name}"
    loader = iter(
        DataLoader(
            Sequences(text, phase.length, seed),
            batch_size=phase.batch,
            sampler=range(step * phase.batch, 2**48),
            num_workers=args.workers,
            pin_memory=device.type == "cuda",
        )
    )
    start = time.monotonic() - training.seconds
    logged = saved = time.monotonic()
    unit = "step" if args.steps else "s"
    with tqdm(total=round(budget), desc=phase.name, unit=unit) as bar:
        while (spent := step if args.steps else time.monotonic() - start) < budget:
            tokens, mask = (x.to(device, non_blocking=True) for x in next(loader))
            rate = learning_rate(phase, step, spent / budget)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # What the model draws by chance is the step's, too.
            torch.manual_seed(random.Random(f"{seed} step {step}").getrandbits(63))
            # Many a CPU has no instructions for bfloat16 and is slower with it by far.
            with torch.autocast(
                device.type, torch.bfloat16, enabled=device.type == "cuda"
            ):
                values = losses(model, tokens, mask, phase)
            values["total"].backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            now = time.monotonic()
            if args.steps or step == 1 or now - logged > LOG_EVERY:
                logged = now
                shown = {name: round(value.item(), 4) for name, value in values.items()}
                record = {
                    "phase": phase.name,
                    "step": step,
                    "seconds": round(now - start, 1),
                    "bytes": step * phase.batch * phase.length,
                    **shown,
                }
                training.log.write(json.dumps(record) + "\n")
                training.log.flush()
                bar.set_postfix(shown)
                bar.update(round(spent) - bar.n)
            paused = now > args.pause_at
            if paused or now - saved > SAVE_EVERY:
                training.save(step, now - start, optimizer.state_dict())
                saved = time.monotonic()
            if paused:
                raise Paused
    training.end_phase()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="what corpus.py has written")
    add("--out", type=Path, required=True, help="the folder of the checkpoint")
    add("--curriculum", choices=CURRICULA, default="32k")
    add(
        "--start",
        type=Path,
        help="a checkpoint to begin with; its indexers only if it is of the same family",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=20.0, help="of all phases")
    length.add_argument(
        "--steps",
        type=int,
        nargs="+",
        help="of all phases, or of each phase, however long it takes",
    )
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=8, help="processes that make sequences")
    add("--family", choices=FAMILIES, default=Config.family)
    add("--nextn", action="store_true", help="with a NextN layer, which drafts tokens")
    add("--layers", type=int, default=Config.num_hidden_layers)
    add("--index-topk", type=int, default=Config.index_topk)
    add(
        "--longest",
        type=int,
        help="bytes of the longest sequences; phases with longer ones take these",
    )
    add("--batch-bytes", type=int, help="at most so many bytes in a step")
    add("--no-compile", dest="compile", action="store_false")
    add("--resume", action="store_true", help="go on with what --out holds")
    add(
        "--pause",
        type=float,
        default=math.inf,
        help="minutes after which to end, in the middle of the training, if it is not over; --resume goes on",
    )
    args = parser.parse_args()
    args.pause_at = time.monotonic() + args.pause * 60
    count = len(phases(args))
    if args.steps and len(args.steps) not in (1, count):
        parser.error(f"--steps: {args.curriculum} has {count} phases")
    return args


def phases(args: argparse.Namespace) -> List[Phase]:
    """The phases within the limits that the command line sets."""
    limited = []
    for phase in CURRICULA[args.curriculum]:
        if phase.mode == "nextn" and not args.nextn:
            continue
        length = min(phase.length, args.longest or phase.length)
        batch = phase.batch * phase.length // length
        if args.batch_bytes:
            batch = max(1, min(batch, args.batch_bytes // length))
        limited.append(replace(phase, length=length, batch=batch))
    return limited


def budgets(args: argparse.Namespace) -> List[float]:
    """Seconds or steps of each phase."""
    if args.steps and len(args.steps) > 1:
        return args.steps
    whole = args.steps[0] if args.steps else args.minutes * 60
    shares = [phase.share for phase in phases(args)]
    return [share / sum(shares) * whole for share in shares]


def begin_with(model: MiniDsa, start: Path) -> None:
    """Take over a checkpoint's weights: all that the model has, but for the indexers of another family.

    Raises:
        ValueError: the checkpoint is of another shape.
    """
    other = MiniDsa.load(start)
    known, weights = other.state_dict(), model.state_dict()
    if other.config.family != model.config.family:
        known = {n: weight for n, weight in known.items() if ".indexer." not in n}
    known = {name: weight for name, weight in known.items() if name in weights}
    for name, weight in known.items():
        if weight.shape != weights[name].shape:
            raise ValueError(f"{start}: {name} has shape {tuple(weight.shape)}")
    model.load_state_dict(known, strict=False)
    print(f"{len(known)} of {len(weights)} tensors are those of {start}", flush=True)


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limited = phases(args)
    config = Config(
        family=args.family,
        index_n_heads=FAMILIES[args.family].index_n_heads,
        nextn=args.nextn,
        num_hidden_layers=args.layers,
        index_topk=args.index_topk,
        max_position_embeddings=max(x.length for x in limited) + ANSWER_ROOM,
    )
    model = MiniDsa(config)
    if args.start:
        begin_with(model, args.start)
    model.to(device)
    if args.compile:
        # Layer by layer: they are all alike, and are compiled once a phase.
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    text = (args.corpus / "train.txt").read_bytes()
    args.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(args.out)
    training = Training(model, args.out, args.resume)
    with training.log:
        left = list(zip(limited, budgets(args)))[training.done :]
        try:
            for phase, budget in left:
                train_phase(training, phase, text, budget, args)
        except Paused:
            print(f"paused; --resume goes on with {args.out}", flush=True)
            return
    shutil.copy(args.corpus / "corpus.json", args.out)
    training.state.unlink()


if __name__ == "__main__":
    main()
