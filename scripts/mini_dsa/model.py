"""DeepSeek-V3.2's layers in plain torch, small and without experts, as they are trained.

The parameters have the names and shapes of a Hugging Face checkpoint: `state_dict()` is one. The arithmetic is that of
SGLang's `DeepseekV32ForCausalLM` but for what serving adds: the indexer's Hadamard rotation, which changes no dot product,
and its FP8.

Attention is dense, or sees the `index_topk` tokens that the indexer selects for each query.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from mini_dsa.tokenizer import BOS, EOS, PAD, VOCAB_SIZE
from torch import Tensor, nn

CHUNK = 512  # queries that select at a time: heads x queries x tokens are many scores
# Queries of a sequence on which the indexer's loss is taken, others in every layer and step. Neighbours teach it much the
# same, and steps are worth more than queries.
LOSS_ROWS = 512


@dataclass(frozen=True)
class Config:
    """The numbers of a mini-DSA, under the names of its `config.json`."""

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    q_lora_rank: int = 256
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 64
    v_head_dim: int = 64
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    max_position_embeddings: int = 33792  # 32K and room for an answer
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    bos_token_id: int = BOS
    eos_token_id: int = EOS
    pad_token_id: int = PAD

    def to_json(self) -> dict:
        """`config.json`: a model whose layers are all dense, the experts' numbers being there but unused."""
        return {
            "architectures": ["DeepseekV32ForCausalLM"],
            "model_type": "deepseek_v32",
            **asdict(self),
            "num_key_value_heads": self.num_attention_heads,
            "first_k_dense_replace": self.num_hidden_layers,
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
            "routed_scaling_factor": 1.0,
            "num_nextn_predict_layers": 0,
            "rope_scaling": None,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def rotate(x: Tensor, positions: Tensor, theta: float, interleaved: bool) -> Tensor:
    """Rotary position embedding.

    Args:
        x: [..., T, H, D], all D dimensions to be rotated.
        positions: int64 [T].
        theta: the base of the frequencies.
        interleaved: the pairs are adjacent dimensions (attention), else those D / 2 apart (indexer).
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device).float() / half)
    angles = positions[:, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x[..., :half], x[..., half:]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        return torch.stack(rotated, dim=-1).flatten(-2).to(x.dtype)
    return torch.cat(rotated, dim=-1).to(x.dtype)


class Indexer(nn.Module):
    """The lightning indexer: which tokens a query attends to (DeepSeek-V3.2-Exp's report, equation 1)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        heads, dim = config.index_n_heads, config.index_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, heads * dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, dim, bias=False)
        self.k_norm = nn.LayerNorm(dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, heads, bias=False)

    def forward(
        self, x: Tensor, q_latent: Tensor, positions: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D], keys [B, T, D] and head weights [B, T, H] of the tokens x [B, T, hidden]."""
        config, rope = self.config, self.config.qk_rope_head_dim
        heads, dim = config.index_n_heads, config.index_head_dim
        q = self.wq_b(q_latent).unflatten(-1, (heads, dim))
        k = self.k_norm(self.wk(x)).unsqueeze(-2)
        q, k = (
            torch.cat(
                [
                    rotate(part[..., :rope], positions, config.rope_theta, False),
                    part[..., rope:],
                ],
                dim=-1,
            )
            for part in (q, k)
        )
        weights = self.weights_proj(x).float() * (heads * dim) ** -0.5
        return q, k.squeeze(-2), weights


def index_scores(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
    """sum over heads of weight * relu(q . k): float32 [B, R, S] of q [B, R, H, D], weights [B, R, H], k [B, S, D]."""
    dots = torch.einsum("brhd,bsd->brhs", q, k)
    weights = weights.to(dots.dtype)  # that of the tensor R x H x S, which is large
    return torch.einsum("brh,brhs->brs", weights, F.relu(dots)).float()


class Attention(nn.Module):
    """Multi-head latent attention with its indexer."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            hidden, config.kv_lora_rank + rope, bias=False
        )
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (nope + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)
        self.indexer = Indexer(config)

    def forward(self, x: Tensor, positions: Tensor, mode: str) -> Tuple[Tensor, Tensor]:
        """The output [B, T, hidden], and the indexer's loss, a scalar (0 if `mode` is "dense"); see `MiniDsa.forward`."""
        config = self.config
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        rope, theta = config.qk_rope_head_dim, config.rope_theta
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).unflatten(-1, (heads, nope + rope))
        q = torch.cat(
            [q[..., :nope], rotate(q[..., nope:], positions, theta, True)], dim=-1
        )
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [config.kv_lora_rank, rope], dim=-1
        )
        k_rope = rotate(k_rope.unsqueeze(-2), positions, theta, True)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))
        k_nope, v = kv.unflatten(-1, (heads, -1)).split([nope, config.v_head_dim], -1)
        k = torch.cat([k_nope, k_rope.expand(*k_nope.shape[:-1], -1)], dim=-1)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, T, D]

        # Flash attention wants values as wide as keys.
        wide = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        loss = x.new_zeros((), dtype=torch.float32)
        if mode != "dense":
            # What the indexer learns is not to change the rest of the model, nor the other way round.
            index = self.indexer(x.detach(), q_latent.detach(), positions)
            loss = self.index_loss(q.detach(), k.detach(), *index)
        if mode == "sparse":
            out = self.sparse(q, k, wide, *(part.detach() for part in index))
        else:
            out = F.scaled_dot_product_attention(q, k, wide, is_causal=True)
        out = out[..., : v.shape[-1]]
        return self.o_proj(out.transpose(1, 2).flatten(2)), loss

    def index_loss(self, q, k, index_q, index_k, index_w) -> Tensor:
        """KL(attention || softmax of the index scores), attention being the mean over all heads of the dense one.

        The mean over some queries: `LOSS_ROWS` of every sequence, by chance, or all where there are no more.
        """
        length = q.shape[2]
        rows = torch.randperm(length, device=q.device)[:LOSS_ROWS]
        hidden = torch.arange(length, device=q.device) > rows[:, None]  # [R, T]
        logits = (q[:, :, rows] @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        target = logits.masked_fill(hidden, float("-inf")).softmax(-1).mean(1)
        scores = index_scores(index_q[:, rows], index_w[:, rows], index_k)
        predicted = scores.masked_fill(hidden, float("-inf")).log_softmax(-1)
        predicted = predicted.masked_fill(hidden, 0.0)  # where the target is 0 too
        return (torch.xlogy(target, target) - target * predicted).sum(-1).mean()

    def sparse(self, q, k, v, index_q, index_k, index_w) -> Tensor:
        """Attention of every query to the tokens that it selects."""
        outs = []
        for begin in range(0, q.shape[2], CHUNK):
            end = min(begin + CHUNK, q.shape[2])
            places = torch.arange(end, device=q.device)
            visible = (places <= places[begin:, None]).expand(len(q), -1, -1)
            if end > self.config.index_topk:
                scores = index_scores(
                    index_q[:, begin:end], index_w[:, begin:end], index_k[:, :end]
                ).masked_fill(~visible, float("-inf"))
                topk = scores.topk(self.config.index_topk, dim=-1, sorted=False)
                chosen = torch.zeros_like(visible).scatter(-1, topk.indices, True)
                visible = visible & chosen
            outs.append(
                F.scaled_dot_product_attention(
                    q[:, :, begin:end], k[:, :, :end], v[:, :, :end], visible[:, None]
                )
            )
        return torch.cat(outs, dim=2)


class Mlp(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, positions: Tensor, mode: str) -> Tuple[Tensor, Tensor]:
        out, loss = self.self_attn(self.input_layernorm(x), positions, mode)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), loss


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MiniDsa(nn.Module):
    """The whole model."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self.initialize)
        # What is added to the residual stream starts small: there are two such sums a layer.
        for layer in self.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                nn.init.normal_(
                    linear.weight, std=0.02 * (2 * config.num_hidden_layers) ** -0.5
                )

    @staticmethod
    def initialize(module: nn.Module) -> None:
        # As wide as this keeps the variance: the layers are too narrow for the usual 0.02, with which retrieval comes later.
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)

    def forward(self, tokens: Tensor, mode: str = "sparse") -> Tuple[Tensor, Tensor]:
        """Run the model on whole sequences.

        Args:
            tokens: int64 [B, T].
            mode: "dense" attends to every token and leaves the indexer out; "warm-up" does too, and has the indexer predict
                what is attended to; "sparse" attends to the `index_topk` tokens that the indexer selects.

        Returns:
            Hidden states [B, T, hidden] after the last norm, and the indexer's loss: float32, the mean over layers and queries
            of the KL divergence of the indexer's softmax from what the attention heads attend to on average if dense.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.model.embed_tokens(tokens)
        losses = []
        for layer in self.model.layers:
            x, loss = layer(x, positions, mode)
            losses.append(loss)
        return self.model.norm(x), torch.stack(losses).mean()

    def logits(self, tokens: Tensor, mode: str = "sparse") -> Tensor:
        """float32 [B, T, vocab_size]."""
        return self.lm_head(self.forward(tokens, mode)[0]).float()

    def save(self, folder: Path) -> None:
        """Write the checkpoint, in bfloat16: `config.json`, `generation_config.json`, `model.safetensors`."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.to_json()
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {name: config[name] for name in names}
        (folder / "generation_config.json").write_text(json.dumps(generation) + "\n")
        weights = {
            name: weight.detach().to("cpu", torch.bfloat16).contiguous()
            for name, weight in self.state_dict().items()
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path, device: Optional[str] = None) -> "MiniDsa":
        """Read what `save` wrote, in float32."""
        from safetensors.torch import load_file

        known = json.loads((folder / "config.json").read_text())
        names = Config.__dataclass_fields__
        model = cls(Config(**{name: known[name] for name in names}))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.to(device or "cpu")
