"""DeepSeek-V3.2's layers in plain torch, small and without experts, as they are trained; or GLM-5's, whose indexer has half the
heads and rotates adjacent dimensions. A NextN layer, which has experts, may draft the token after the next one.

The parameters have the names and shapes of a Hugging Face checkpoint: `state_dict()` is one. The arithmetic is that of
SGLang's `DeepseekV32ForCausalLM` and `GlmMoeDsaForCausalLM` but for what serving adds: the indexer's Hadamard rotation, which
changes no dot product, and its FP8.

Attention is dense, or sees the `index_topk` tokens that the indexer selects for each query.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from mini_dsa.tokenizer import BOS, EOS, PAD, VOCAB_SIZE
from tiny_model import FAMILIES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK = 512  # queries that attend to what they select at a time
# Scores of single heads that there are at a time, queries x heads x tokens: 2 GiB in bfloat16. Backward has four such tensors.
SCORES = 2**30
# Queries of a sequence on which the indexer's loss is taken, others in every layer and step. Neighbours teach it much the
# same, and steps are worth more than queries.
LOSS_ROWS = 512
# Of a layer with experts, which the NextN layer alone is.
EXPERTS = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Config:
    """The numbers of a mini-DSA, under the names of its `config.json`.

    family        one of `FAMILIES`
    nextn         there is a NextN layer behind the others
    """

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
    family: str = "deepseek_v32"
    nextn: bool = False

    @property
    def index_rope_interleave(self) -> bool:
        """The indexer rotates pairs of adjacent dimensions, else those half the rotated width apart."""
        return FAMILIES[self.family].config.get("indexer_rope_interleave", False)

    @classmethod
    def from_json(cls, known: dict) -> "Config":
        """Of a `config.json` that `to_json` has made."""
        known = {
            "rope_theta": known.get("rope_parameters", {}).get("rope_theta"),
            **known,
            "family": known["model_type"],
            "nextn": bool(known["num_nextn_predict_layers"]),
        }
        return cls(**{name: known[name] for name in cls.__dataclass_fields__})

    def to_json(self) -> dict:
        """`config.json`: a model whose layers are all dense but for the NextN layer, which alone has experts."""
        family, numbers = FAMILIES[self.family], asdict(self)
        for name in ("family", "nextn"):
            del numbers[name]
        rope = {"rope_scaling": None}
        if "rope_parameters" in family.config:
            theta = {"rope_theta": numbers.pop("rope_theta")}
            rope = {
                **family.config,
                "rope_parameters": {**family.config["rope_parameters"], **theta},
            }
        return {
            "architectures": [family.architecture],
            "model_type": self.family,
            **numbers,
            "num_key_value_heads": self.num_attention_heads,
            "first_k_dense_replace": self.num_hidden_layers,
            "moe_layer_freq": 1,
            **EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "num_nextn_predict_layers": int(self.nextn),
            **rope,
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
        interleaved: the pairs are adjacent dimensions (attention), else those D / 2 apart (DeepSeek's indexer).
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

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Of x [B, T, H, D] the first dimensions."""
        config, rope = self.config, self.config.qk_rope_head_dim
        rotated = rotate(
            x[..., :rope], positions, config.rope_theta, config.index_rope_interleave
        )
        return torch.cat([rotated, x[..., rope:]], dim=-1)

    def queries(
        self, x: Tensor, q_latent: Tensor, positions: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """Queries [B, R, H, D] and head weights [B, R, H] of the tokens x [B, R, hidden], which have positions [R]."""
        heads, dim = self.config.index_n_heads, self.config.index_head_dim
        q = self.wq_b(q_latent).unflatten(-1, (heads, dim))
        weights = self.weights_proj(x).float() * (heads * dim) ** -0.5
        return self.rotate(q, positions), weights

    def keys(self, x: Tensor, positions: Tensor) -> Tensor:
        """Keys [B, T, D] of the tokens x [B, T, hidden]."""
        k = self.k_norm(self.wk(x)).unsqueeze(-2)
        return self.rotate(k, positions).squeeze(-2)

    def forward(
        self, x: Tensor, q_latent: Tensor, positions: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and head weights of the same tokens."""
        q, weights = self.queries(x, q_latent, positions)
        return q, self.keys(x, positions), weights


def index_scores(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
    """sum over heads of weight * relu(q . k): float32 [B, R, S] of q [B, R, H, D], weights [B, R, H], k [B, S, D]."""
    dots = torch.einsum("brhd,bsd->brhs", q, k)
    weights = weights.to(dots.dtype)  # that of the tensor R x H x S, which is large
    return torch.einsum("brh,brhs->brs", weights, F.relu(dots)).float()


def rows_at_once(config: Config, tokens: int) -> int:
    """Queries that are scored at a time, where each of them sees so many tokens."""
    return max(1, SCORES // (config.index_n_heads * tokens))


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

    def forward(
        self, x: Tensor, positions: Tensor, mode: str, sparse_share: float = 1.0
    ) -> Tuple[Tensor, Tensor]:
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
        if mode == "dense":
            out = F.scaled_dot_product_attention(q, k, wide, is_causal=True)
        else:
            # What the indexer learns is not to change the rest of the model, nor the other way round.
            x, q_latent = x.detach(), q_latent.detach()
            index_k = self.indexer.keys(x, positions)

            def queries(rows) -> Tuple[Tensor, Tensor]:
                return self.indexer.queries(x[:, rows], q_latent[:, rows], positions[rows])  # fmt: skip

            loss = self.index_loss(q.detach(), k.detach(), index_k, queries)
            share = sparse_share if mode == "sparse" else 0.0
            out = self.attend(q, k, wide, index_k.detach(), queries, share)
        out = out[..., : v.shape[-1]]
        return self.o_proj(out.transpose(1, 2).flatten(2)), loss

    def index_loss(self, q, k, index_k, queries) -> Tensor:
        """KL(attention || softmax of the index scores), attention being the mean over all heads of the dense one.

        The mean over some queries: `LOSS_ROWS` of every sequence, by chance, or all where there are no more.
        """
        length = q.shape[2]
        rows = torch.randperm(length, device=q.device)[:LOSS_ROWS]
        index_q, index_w = queries(rows)

        def divergence(rows, index_q, index_w, index_k) -> Tensor:
            hidden = torch.arange(length, device=q.device) > rows[:, None]  # [R, T]
            logits = (q[:, :, rows] @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
            target = logits.masked_fill(hidden, float("-inf")).softmax(-1).mean(1)
            scores = index_scores(index_q, index_w, index_k)
            predicted = scores.masked_fill(hidden, float("-inf")).log_softmax(-1)
            predicted = predicted.masked_fill(hidden, 0.0)  # where the target is 0 too
            return (torch.xlogy(target, target) - target * predicted).sum()

        at_once = rows_at_once(self.config, length)
        if len(rows) <= at_once:
            total = divergence(rows, index_q, index_w, index_k)
        else:
            # Backward computes the scores again, of which there are too many to keep those of all layers.
            parts = (part.split(at_once, dim) for part, dim in ((rows, 0), (index_q, 1), (index_w, 1)))  # fmt: skip
            total = sum(
                checkpoint(
                    divergence,
                    *part,
                    index_k,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for part in zip(*parts)
            )
        return total / (len(q) * len(rows))

    def attend(self, q, k, v, index_k, queries, sparse_share: float) -> Tensor:
        """Attention: of some chunks of queries, by chance, to the tokens that each query selects, of the others to all."""
        length = q.shape[2]
        begins = range(0, length, CHUNK)
        count = math.ceil(sparse_share * len(begins))
        sparse = set(torch.randperm(len(begins))[:count].tolist())
        if len(sparse) < len(begins):
            dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            if not sparse:
                return dense
            outs = list(dense.split(CHUNK, dim=2))
        else:
            outs = [None] * len(begins)
        for number in sparse:
            begin, end = begins[number], min(begins[number] + CHUNK, length)
            visible = self.selected(begin, end, index_k, queries)
            outs[number] = F.scaled_dot_product_attention(
                q[:, :, begin:end], k[:, :, :end], v[:, :, :end], visible[:, None]
            )
        return torch.cat(outs, dim=2)

    @torch.no_grad()
    def selected(self, begin: int, end: int, index_k, queries) -> Tensor:
        """What the queries from `begin` to `end` attend to: bool [B, end - begin, end]."""
        places = torch.arange(end, device=index_k.device)
        visible = (places <= places[begin:, None]).expand(len(index_k), -1, -1)
        if end <= self.config.index_topk:
            return visible
        scores = torch.cat(
            [
                index_scores(*queries(rows), index_k[:, :end])
                for rows in places[begin:].split(rows_at_once(self.config, end))
            ],
            dim=1,
        ).masked_fill(~visible, float("-inf"))
        topk = scores.topk(self.config.index_topk, dim=-1, sorted=False)
        chosen = torch.zeros_like(visible).scatter(-1, topk.indices, True)
        return visible & chosen


class Mlp(nn.Module):
    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """A shared expert, and the two routed ones that a token's gates choose."""

    def __init__(self, hidden: int):
        super().__init__()
        inner, count = EXPERTS["moe_intermediate_size"], EXPERTS["n_routed_experts"]
        self.gate = nn.Linear(hidden, count, bias=False)
        # What SGLang adds before it chooses, to balance the load: nothing here.
        self.gate.register_buffer("e_score_correction_bias", torch.zeros(count))
        self.shared_experts = Mlp(hidden, inner * EXPERTS["n_shared_experts"])
        self.experts = nn.ModuleList(Mlp(hidden, inner) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        # All experts of all tokens: they are few and small.
        scores = self.gate(x).float().sigmoid()
        best = scores.topk(EXPERTS["num_experts_per_tok"], dim=-1).indices
        gates = torch.zeros_like(scores).scatter(-1, best, scores.gather(-1, best))
        gates = (gates / gates.sum(-1, keepdim=True)).to(x.dtype)
        routed = sum(
            gate * expert(x)
            for gate, expert in zip(gates.split(1, dim=-1), self.experts)
        )
        return routed + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.mlp = Mlp(hidden, config.intermediate_size)

    def forward(
        self, x: Tensor, positions: Tensor, mode: str, sparse_share: float = 1.0
    ) -> Tuple[Tensor, Tensor]:
        normed = self.input_layernorm(x)
        out, loss = self.self_attn(normed, positions, mode, sparse_share)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), loss


class NextN(Layer):
    """A layer that drafts the token after the next one, from the next one and from what the model has of those before it."""

    def __init__(self, config: Config):
        super().__init__(config)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.mlp = Experts(hidden)
        self.enorm = nn.RMSNorm(hidden, eps=eps)
        self.hnorm = nn.RMSNorm(hidden, eps=eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.shared_head = nn.ModuleDict({"norm": nn.RMSNorm(hidden, eps=eps)})

    def draft(
        self, embedded: Tensor, before: Tensor, positions: Tensor, *mode
    ) -> Tuple[Tensor, Tensor]:
        """See `MiniDsa.draft`; embedded [B, T, hidden] are the next tokens."""
        parts = self.enorm(embedded), self.hnorm(before)
        x, loss = self(self.eh_proj(torch.cat(parts, dim=-1)), positions, *mode)
        return self.shared_head["norm"](x), loss


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config) for _ in range(config.num_hidden_layers)
        )
        if config.nextn:
            self.layers.append(NextN(config))
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
        std = 0.02 * (2 * config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=std)

    @property
    def layers(self) -> List[Layer]:
        """All but the NextN layer."""
        return list(self.model.layers[: self.config.num_hidden_layers])

    @property
    def nextn(self) -> NextN:
        """The NextN layer of a model that has one."""
        return self.model.layers[self.config.num_hidden_layers]

    @staticmethod
    def initialize(module: nn.Module) -> None:
        # As wide as this keeps the variance: the layers are too narrow for the usual 0.02, with which retrieval comes later.
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)

    def forward(
        self, tokens: Tensor, mode: str = "sparse", sparse_share: float = 1.0
    ) -> Tuple[Tensor, Tensor]:
        """Run the model on whole sequences, without the NextN layer.

        Args:
            tokens: int64 [B, T].
            mode: "dense" attends to every token and leaves the indexer out; "warm-up" does too, and has the indexer predict
                what is attended to; "sparse" attends to the `index_topk` tokens that the indexer selects.
            sparse_share: of the queries in mode "sparse" only so many do, whole chunks of them by chance; the others attend to
                every token.

        Returns:
            Hidden states [B, T, hidden] after the last norm, and the indexer's loss: float32, the mean over layers and queries
            of the KL divergence of the indexer's softmax from what the attention heads attend to on average if dense.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.model.embed_tokens(tokens)
        losses = []
        for layer in self.layers:
            x, loss = layer(x, positions, mode, sparse_share)
            losses.append(loss)
        return self.model.norm(x), torch.stack(losses).mean()

    def draft(
        self, tokens: Tensor, before: Tensor, mode: str = "sparse", sparse_share=1.0
    ) -> Tuple[Tensor, Tensor]:
        """Run the NextN layer on whole sequences.

        Nothing outside of it learns from its outputs.

        Args:
            tokens: int64 [B, T], the tokens that come next.
            before: [B, T, hidden], what `forward` returns of the tokens before those; or what this returned, of drafts.
            mode, sparse_share: those of `forward`.

        Returns:
            What the head makes the token of that comes after `tokens`, [B, T, hidden]; and its indexer's loss.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        embedded = self.model.embed_tokens(tokens).detach()
        return self.nextn.draft(embedded, before.detach(), positions, mode, sparse_share)  # fmt: skip

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

        model = cls(Config.from_json(json.loads((folder / "config.json").read_text())))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.to(device or "cpu")
