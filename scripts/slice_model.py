# SPDX-License-Identifier: Apache-2.0
"""Writes what one GPU of eight holds of a large DSA model, in a few layers and with random weights:

    python scripts/slice_model.py slices --models deepseek-v3.2-tp8 glm-5-tp8 --layers 4

Every model gets a folder that SGLang serves on one GPU. The weights are bfloat16 and have a realistic scale, so that scores are
neither equal nor chaos. `--dummy` writes no weights, for `--load-format dummy`. Gigabytes; seconds where there is a GPU.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, Tuple

import torch
from tiny_model import FAMILIES, make_weights

GPUS = 8
TEXT = "token"


@dataclass(frozen=True)
class Model:
    """A whole model: its family, what its config.json says, and how its experts are grouped."""

    family: str
    config: dict
    groups: Tuple[int, int]  # n_group, topk_group


MODELS = {
    "deepseek-v3.2": Model(
        family="deepseek_v32",
        config={
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "max_position_embeddings": 163840,
            "rms_norm_eps": 1e-6,
        },
        groups=(8, 4),
    ),
    "glm-5": Model(
        family="glm_moe_dsa",
        config={
            "vocab_size": 154880,
            "hidden_size": 6144,
            "intermediate_size": 12288,
            "moe_intermediate_size": 2048,
            "num_attention_heads": 64,
            "q_lora_rank": 2048,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "max_position_embeddings": 202752,
            "rms_norm_eps": 1e-5,
        },
        groups=(1, 1),
    ),
}
EXPERTS = 256
# The share of one GPU. Tensor parallelism splits heads and experts' widths. With data parallelism of the attention and expert
# parallelism a GPU has all heads and an eighth of the experts, which get as many tokens as it has itself. Both split the
# vocabulary.
SHARES = ("tp8", "dp8")
NAMES = tuple(f"{model}-{share}" for model in MODELS for share in SHARES)


def make_config(name: str, layers: int) -> dict:
    """The config.json of one of NAMES: a dense layer, MoE layers behind it and a NextN layer behind these."""
    model_name, share = name.rsplit("-", 1)
    model = MODELS[model_name]
    family, config = FAMILIES[model.family], dict(model.config)
    config["vocab_size"] //= GPUS
    n_group, topk_group = model.groups
    experts = EXPERTS
    if share == "tp8":
        for split in ("num_attention_heads", "intermediate_size"):
            config[split] //= GPUS
        config["moe_intermediate_size"] //= GPUS
    else:
        experts //= GPUS
        n_group = topk_group = 1
    last = config["vocab_size"] - 1
    return {
        "architectures": [family.architecture],
        "model_type": model.family,
        **config,
        "num_hidden_layers": layers,
        "num_key_value_heads": config["num_attention_heads"],
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "index_n_heads": family.index_n_heads,
        "index_head_dim": 128,
        "index_topk": 2048,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": n_group,
        "topk_group": topk_group,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": last,
        "eos_token_id": last,
        "pad_token_id": last,
        **family.config,
    }


def moe_layer(config: dict, layer: int, device: str) -> Dict[str, torch.Tensor]:
    """The weights of an MoE layer: those of a dense one whose MLP is the shared expert, and the routed experts."""
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    one = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0, "vocab_size": 1}
    one["intermediate_size"] = inner
    weights = {}
    for name, weight in make_weights({**config, **one}, seed=layer).items():
        if name.startswith("model.layers.0."):
            name = name.replace("layers.0.", f"layers.{layer}.")
            weights[name.replace(".mlp.", ".mlp.shared_experts.")] = weight

    generator = torch.Generator(device).manual_seed(layer)

    def linear(name: str, fan_out: int, fan_in: int) -> None:
        weight = torch.randn(
            (fan_out, fan_in), generator=generator, device=device, dtype=torch.bfloat16
        )
        weights[f"{name}.weight"] = weight.mul_(fan_in**-0.5).cpu()

    mlp, experts = f"model.layers.{layer}.mlp", config["n_routed_experts"]
    linear(f"{mlp}.gate", experts, hidden)
    weights[f"{mlp}.gate.e_score_correction_bias"] = torch.zeros(experts)
    for expert in range(experts):
        linear(f"{mlp}.experts.{expert}.gate_proj", inner, hidden)
        linear(f"{mlp}.experts.{expert}.up_proj", inner, hidden)
        linear(f"{mlp}.experts.{expert}.down_proj", hidden, inner)
    if layer == config["num_hidden_layers"]:
        nextn = f"model.layers.{layer}"
        linear(f"{nextn}.eh_proj", hidden, 2 * hidden)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            ones = torch.ones(hidden, dtype=torch.bfloat16)
            weights[f"{nextn}.{norm}.weight"] = ones
    return weights


def make_parts(config: dict, device: str) -> Iterator[Dict[str, torch.Tensor]]:
    """All weights, a layer at a time, the last one being the NextN layer; the same ones for the same device."""
    one = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0}
    yield make_weights({**config, **one}, seed=0)
    for layer in range(1, config["num_hidden_layers"] + 1):
        yield moe_layer(config, layer, device)


def write_words(out_dir: Path, vocab_size: int) -> None:
    """A tokenizer whose every token is a word of its own, "token17" for 17, so that all of them make text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {f"{TEXT}{token}": token for token in range(vocab_size)}
    last = f"{TEXT}{vocab_size - 1}"
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=last))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(out_dir)


def write_slice(out_dir: Path, config: dict, dummy: bool, device: str) -> None:
    """Write the checkpoint of a configuration; without its weights if `dummy`."""
    from safetensors.torch import save_file

    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_words(out_dir, config["vocab_size"])
    if dummy:
        return
    files, total = {}, 0
    for number, weights in enumerate(make_parts(config, device)):
        file = f"model-{number:05}.safetensors"
        save_file(weights, out_dir / file, metadata={"format": "pt"})
        files |= dict.fromkeys(weights, file)
        total += sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (out_dir / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out_dir", type=Path)
    add("--models", nargs="+", choices=NAMES, default=NAMES[:1])
    add("--layers", type=int, default=4, help="the first one is dense")
    add("--dummy", action="store_true", help="config and tokenizer alone")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in args.models:
        folder = args.out_dir / f"{name}-{args.layers}l"
        write_slice(folder, make_config(name, args.layers), args.dummy, device)
        print(f"wrote {folder}")


if __name__ == "__main__":
    main()
