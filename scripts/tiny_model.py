# SPDX-License-Identifier: Apache-2.0
"""Writes a tiny random DSA checkpoint: `python scripts/tiny_model.py OUT_DIR --family glm_moe_dsa`.

The weights have a realistic scale, so that attention, and with it the selection of tokens, changes the output.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from mini_dsa.tokenizer import BOS, EOS, PAD, VOCAB_SIZE, write_tokenizer


@dataclass(frozen=True)
class Family:
    architecture: str
    index_n_heads: int
    config: dict


FAMILIES = {
    "deepseek_v32": Family(
        architecture="DeepseekV32ForCausalLM",
        index_n_heads=64,
        config={
            "rope_theta": 10000,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "glm_moe_dsa": Family(
        architecture="GlmMoeDsaForCausalLM",
        index_n_heads=32,
        config={
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
            "rope_interleave": True,
            "indexer_rope_interleave": True,
        },
    ),
}


def make_config(family: str, layers: int, index_topk: int, nextn: bool) -> dict:
    """The config.json of a model whose layers are all dense, but for the NextN layer if it is to have one."""
    spec = FAMILIES[family]
    return {
        "architectures": [spec.architecture],
        "model_type": family,
        "vocab_size": VOCAB_SIZE,
        # SGLang's kernel for the input of a NextN layer takes no less than 512.
        "hidden_size": 512 if nextn else 256,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 256,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "index_n_heads": spec.index_n_heads,
        "index_head_dim": 128,
        "index_topk": index_topk,
        "first_k_dense_replace": layers,
        "moe_layer_freq": 1,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": int(nextn),
        "max_position_embeddings": 163840,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **spec.config,
    }


def make_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Random weights under the names of a Hugging Face checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def normal(name: str, *shape: int, std: float) -> None:
        weight = torch.randn(shape, generator=generator) * std
        weights[name] = weight.to(torch.bfloat16)

    def linear(name: str, fan_out: int, fan_in: int) -> None:
        normal(f"{name}.weight", fan_out, fan_in, std=fan_in**-0.5)

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)

    hidden = config["hidden_size"]
    heads, rope = config["num_attention_heads"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]

    def mlp(name: str, inner: int) -> None:
        linear(f"{name}.gate_proj", inner, hidden)
        linear(f"{name}.up_proj", inner, hidden)
        linear(f"{name}.down_proj", hidden, inner)

    def attention_layer(prefix: str) -> None:
        norm(f"{prefix}.input_layernorm", hidden)
        norm(f"{prefix}.post_attention_layernorm", hidden)
        attention = f"{prefix}.self_attn"
        linear(f"{attention}.q_a_proj", q_rank, hidden)
        norm(f"{attention}.q_a_layernorm", q_rank)
        linear(f"{attention}.q_b_proj", heads * (nope + rope), q_rank)
        linear(f"{attention}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
        norm(f"{attention}.kv_a_layernorm", kv_rank)
        linear(f"{attention}.kv_b_proj", heads * (nope + value), kv_rank)
        linear(f"{attention}.o_proj", hidden, heads * value)
        indexer = f"{attention}.indexer"
        linear(f"{indexer}.wq_b", index_heads * index_dim, q_rank)
        linear(f"{indexer}.wk", index_dim, hidden)
        linear(f"{indexer}.weights_proj", index_heads, hidden)
        norm(f"{indexer}.k_norm", index_dim)
        normal(f"{indexer}.k_norm.bias", index_dim, std=0.02)

    def nextn_layer(prefix: str) -> None:
        """Drafts by the token's embedding above all."""
        norm(f"{prefix}.enorm", hidden)
        norm(f"{prefix}.hnorm", hidden)
        normal(f"{prefix}.eh_proj.weight", hidden, 2 * hidden, std=0.2 * hidden**-0.5)
        weights[f"{prefix}.eh_proj.weight"][:, :hidden] += torch.eye(hidden)
        attention_layer(prefix)
        moe, experts = f"{prefix}.mlp", config["n_routed_experts"]
        linear(f"{moe}.gate", experts, hidden)
        bias = torch.zeros(experts, dtype=torch.float32)
        weights[f"{moe}.gate.e_score_correction_bias"] = bias
        for name in ("shared_experts", *(f"experts.{i}" for i in range(experts))):
            mlp(f"{moe}.{name}", config["moe_intermediate_size"])
        norm(f"{prefix}.shared_head.norm", hidden)
        # What its attention and experts add is small.
        outputs = "o_proj.weight", "down_proj.weight"
        for name in weights:
            if name.startswith(prefix) and name.endswith(outputs):
                weights[name] *= 0.1

    layers = config["num_hidden_layers"]
    # A draft knows the token, and not what the layers add to it: the more the token decides, the more drafts are right.
    embedding = 3.0 if config["num_nextn_predict_layers"] else 1.0
    normal("model.embed_tokens.weight", config["vocab_size"], hidden, std=embedding)
    for layer in range(layers):
        attention_layer(f"model.layers.{layer}")
        mlp(f"model.layers.{layer}.mlp", config["intermediate_size"])
    norm("model.norm", hidden)
    linear("lm_head", config["vocab_size"], hidden)
    if config["num_nextn_predict_layers"]:
        nextn_layer(f"model.layers.{layers}")
    return weights


def write_tiny_model(
    out_dir: Path,
    family: str = "deepseek_v32",
    layers: int = 3,
    index_topk: int = 2048,
    seed: int = 0,
    nextn: bool = False,
) -> None:
    """Writes the checkpoint. The same arguments give the same bytes.

    With `nextn` it is twice as wide, and has a NextN layer for speculative decoding behind the others.
    """
    from safetensors.torch import save_file

    out_dir.mkdir(parents=True, exist_ok=True)
    config = make_config(family, layers, index_topk, nextn)
    (out_dir / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    (out_dir / "generation_config.json").write_text(json.dumps(generation, indent=2))
    save_file(
        make_weights(config, seed),
        out_dir / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_tokenizer(out_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="deepseek_v32")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--index-topk", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--nextn", action="store_true", help="with a NextN layer for drafts"
    )
    write_tiny_model(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
