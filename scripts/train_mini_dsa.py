"""Trains mini-DSA: dense attention, then the indexer, then both with the attention that the indexer selects.

    python scripts/mini_dsa/corpus.py corpus
    python scripts/train_mini_dsa.py --corpus corpus --out checkpoint

Minutes on one Hopper GPU. `<out>/training.jsonl` says how it went. With --resume, a training that was broken off goes on with
the phase in which it was.
"""

import argparse
import json
import math
import random
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import torch
import torch.nn.functional as F
from mini_dsa.model import Config, MiniDsa
from mini_dsa.tasks import make_sequence
from mini_dsa.tokenizer import write_tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm


@dataclass(frozen=True)
class Phase:
    """What is trained, and how.

    mode          of `MiniDsa.forward`; "warm-up" trains the indexer alone, "dense" all but the indexer
    length        bytes of a sequence
    batch         sequences of a step
    share         of the whole time, or of all steps
    lr            the highest learning rate; it falls to a tenth of it in the course of the phase
    """

    name: str
    mode: str
    length: int
    batch: int
    share: float
    lr: float


# The length grows once retrieval works at the one before.
PHASES = (
    Phase("dense 2K", "dense", 2048, 64, 0.21, 2e-3),
    Phase("dense 8K", "dense", 8192, 16, 0.13, 1e-3),
    Phase("dense 32K", "dense", 32768, 4, 0.2, 7e-4),
    Phase("warm-up 8K", "warm-up", 8192, 4, 0.13, 1e-3),
    Phase("warm-up 32K", "warm-up", 32768, 1, 0.14, 5e-4),
    Phase("sparse 32K", "sparse", 32768, 1, 0.19, 3e-4),
)
ANSWER_WEIGHT = 4.0  # of a byte of an answer; of any other, 1
STEPS_TO_LR = 100
LOG_EVERY = 5.0  # seconds; with --steps, every step is logged


class Sequences(IterableDataset):
    """Endless sequences: tokens int64 [length + 1] and the mask of the answers, bool [length + 1]."""

    def __init__(self, text: bytes, length: int, seed: int):
        self.text, self.length, self.seed = text, length, seed

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed} {worker.id if worker else 0}")
        while True:
            sequence, mask = make_sequence(rng, self.text, self.length + 1)
            tokens = torch.frombuffer(bytearray(sequence), dtype=torch.uint8)
            yield tokens.long(), torch.frombuffer(mask, dtype=torch.uint8).bool()


def learning_rate(phase: Phase, step: int, progress: float) -> float:
    """progress: 0 to 1, how much of the phase is over."""
    falling = 0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return phase.lr * falling * min(1.0, (step + 1) / STEPS_TO_LR)


def trained(model: MiniDsa, mode: str) -> List[torch.nn.Parameter]:
    """The parameters that a mode trains."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if mode == "sparse" or (".indexer." in name) == (mode == "warm-up")
    ]


def losses(
    model: MiniDsa, tokens: Tensor, mask: Tensor, mode: str
) -> Dict[str, Tensor]:
    """What is minimised ("total") and what is worth knowing: means over a batch of sequences.

    "answers" is the share of the answers' bytes that are the likeliest ones, "kl" the indexer's loss.
    """
    hidden, kl = model(tokens[:, :-1], mode)
    if mode == "warm-up":
        return {"total": kl, "kl": kl}
    logits, targets, asked = model.lm_head(hidden).float(), tokens[:, 1:], mask[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    weights = torch.where(asked.flatten(), ANSWER_WEIGHT, 1.0)
    right = (logits.argmax(-1) == targets)[asked]
    return {
        "total": (each * weights).sum() / weights.sum() + kl,
        "text": each[~asked.flatten()].mean(),
        "answers": right.float().sum() / max(1, right.numel()),
        "kl": kl,
    }


def train_phase(model: MiniDsa, phase: Phase, text: bytes, args, log) -> None:
    device = next(model.parameters()).device
    parameters = trained(model, phase.mode)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        parameters, betas=(0.9, 0.95), weight_decay=0.01, fused=device.type == "cuda"
    )
    # The chunks of the other modes have too many shapes to be compiled, and are large enough not to need it.
    torch.compiler.set_stance("default" if phase.mode == "dense" else "force_eager")
    loader = iter(
        DataLoader(
            Sequences(text, phase.length, args.seed),
            batch_size=phase.batch,
            num_workers=args.workers,
            pin_memory=device.type == "cuda",
        )
    )
    # Seconds or steps; at least one step in any case.
    budget = phase.share * (args.steps or args.minutes * 60)
    start = logged = time.monotonic()
    step = 0
    unit = "step" if args.steps else "s"
    with tqdm(total=round(budget), desc=phase.name, unit=unit) as bar:
        while (spent := step if args.steps else time.monotonic() - start) < budget:
            tokens, mask = (x.to(device, non_blocking=True) for x in next(loader))
            rate = learning_rate(phase, step, spent / budget)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16):
                values = losses(model, tokens, mask, phase.mode)
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
                log.write(json.dumps(record) + "\n")
                log.flush()
                bar.set_postfix(shown)
                bar.update(round(spent) - bar.n)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="what corpus.py has written")
    add("--out", type=Path, required=True, help="the folder of the checkpoint")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=20.0, help="of all phases")
    length.add_argument(
        "--steps", type=int, help="of all phases, however long it takes"
    )
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=8, help="processes that make sequences")
    add("--layers", type=int, default=Config.num_hidden_layers)
    add("--index-topk", type=int, default=Config.index_topk)
    add(
        "--longest",
        type=int,
        default=32768,
        help="bytes of the longest sequences; phases with longer ones take these",
    )
    add("--batch-bytes", type=int, help="at most so many bytes in a step")
    add("--no-compile", dest="compile", action="store_false")
    add("--resume", action="store_true", help="go on with what --out holds")
    return parser.parse_args()


def phases(args: argparse.Namespace) -> List[Phase]:
    """The phases within the limits that the command line sets."""
    limited = []
    for phase in PHASES:
        length = min(phase.length, args.longest)
        batch = phase.batch * phase.length // length
        if args.batch_bytes:
            batch = max(1, min(batch, args.batch_bytes // length))
        limited.append(replace(phase, length=length, batch=batch))
    return limited


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Config(num_hidden_layers=args.layers, index_topk=args.index_topk)
    model = MiniDsa(config).to(device)
    if args.compile:
        # Layer by layer: they are all alike, and are compiled once a phase.
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    text = (args.corpus / "train.txt").read_bytes()
    args.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(args.out)
    state, done = args.out / "training.pt", 0
    if args.resume:
        saved = torch.load(state, map_location=device)
        model.load_state_dict(saved["model"])
        done = saved["phases"]
    with (args.out / "training.jsonl").open("a" if done else "w") as log:
        for number, phase in enumerate(phases(args)[done:], done + 1):
            train_phase(model, phase, text, args, log)
            model.save(args.out)
            torch.save({"model": model.state_dict(), "phases": number}, state)
    shutil.copy(args.corpus / "corpus.json", args.out)
    state.unlink()


if __name__ == "__main__":
    main()
