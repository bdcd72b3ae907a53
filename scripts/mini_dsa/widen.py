"""A checkpoint twice as wide that computes the same: for a NextN layer on a GPU, where SGLang takes no model as narrow as 256.

    cd scripts && python -m mini_dsa.widen CHECKPOINT OUT_DIR

Every hidden state is there twice, so norms see the same mean square; what writes it writes both halves, and what reads it takes
half of each. Halves of bfloat16 numbers are exact.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from mini_dsa.model import MiniDsa
from torch import Tensor

# By the end of a name: weights that read hidden states, along their last dimension, and those that write them, along the first.
READ = (
    *("q_a_proj", "kv_a_proj_with_mqa", "indexer.wk", "indexer.weights_proj"),
    *("gate_proj", "up_proj", "mlp.gate", "lm_head"),
)
WRITE = (
    *("o_proj", "down_proj", "input_layernorm", "post_attention_layernorm"),
    *("model.norm", "enorm", "hnorm", "shared_head.norm"),
)


def widen(name: str, weight: Tensor) -> Tensor:
    """A weight of the wider model, of its name in a checkpoint."""
    module = name.removesuffix(".weight")
    if module.endswith("embed_tokens"):
        return torch.cat([weight, weight], dim=1)
    if module.endswith("eh_proj"):
        embedded, before = (weight / 2).chunk(2, dim=1)
        weight = torch.cat([embedded, embedded, before, before], dim=1)
        return torch.cat([weight, weight])
    if module.endswith(READ):
        return torch.cat([weight / 2, weight / 2], dim=1)
    if module.endswith(WRITE):
        return torch.cat([weight, weight])
    return weight


def widened(model: MiniDsa) -> MiniDsa:
    config = model.config
    wide = MiniDsa(replace(config, hidden_size=2 * config.hidden_size))
    wide.load_state_dict({k: widen(k, v) for k, v in model.state_dict().items()})
    return wide


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args()
    widened(MiniDsa.load(args.checkpoint)).save(args.out_dir)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.checkpoint / name, args.out_dir)


if __name__ == "__main__":
    main()
