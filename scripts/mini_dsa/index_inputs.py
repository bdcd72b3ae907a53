"""What mini-DSA's indexers are given when it reads text: queries, gates and keys of every layer, as SGLang quantizes them.

    cd scripts && python -m mini_dsa.index_inputs OUT.pt [--windows 4] [--tokens 32768] [--rows 2048] [--text FILE]

The text is Python's own reference if no other is named, which every Python brings along (`pydoc_data.topics`): of the kind that the
model was trained on. Takes seconds on a GPU, an hour on two cores for 32K tokens.
"""

import argparse
from pathlib import Path
from typing import Dict, Optional

import torch
from mini_dsa.model import MiniDsa
from torch import Tensor

from sglang.srt.layers.misa.testing.inputs import quantize

CHECKPOINT = Path(__file__).parent / "checkpoint"


def reference_text() -> bytes:
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values()).encode()


def rotate_activation(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform that SGLang applies to the indexer's q and k before it quantizes them."""
    matrix = torch.ones(1, 1, device=x.device)
    while len(matrix) < x.shape[-1]:
        matrix = torch.kron(matrix, matrix.new_tensor([[1, 1], [1, -1]]))
    return (x.float() @ matrix * x.shape[-1] ** -0.5).to(x.dtype)


@torch.no_grad()
def index_inputs(model: MiniDsa, tokens: Tensor, rows: int) -> Dict[str, Tensor]:
    """Run the model on one sequence, int64 [T], and keep what each of its L indexers is given.

    Returns:
        q float8_e4m3fn [L, rows, H, 128] and weights float32 [L, rows, H] of the last `rows` tokens, with q's scale folded in;
        k float8_e4m3fn [L, T, 128] and k_scale float32 [L, T] of all.
    """
    positions = torch.arange(len(tokens), device=tokens.device)
    x = model.model.embed_tokens(tokens[None])
    layers = []
    for layer in model.layers:
        normed, attention = layer.input_layernorm(x), layer.self_attn
        q_latent = attention.q_a_layernorm(attention.q_a_proj(normed))
        q, k, weights = attention.indexer(normed, q_latent, positions)
        q, k = q[0, -rows:], k[0]
        if not model.config.index_rope_interleave:  # else SGLang leaves that out
            q, k = rotate_activation(q), rotate_activation(k)
        q, q_scale = quantize(q.float(), True)
        k, k_scale = quantize(k.float(), True)
        layers.append((q, weights[0, -rows:] * q_scale, k, k_scale))
        x, _ = layer(x, positions, "sparse")
    names = ("q", "weights", "k", "k_scale")
    return {name: stack(parts) for name, parts in zip(names, zip(*layers))}


def stack(parts) -> Tensor:
    """`torch.stack`, for FP8 too."""
    if parts[0].dtype != torch.float8_e4m3fn:
        return torch.stack(parts)
    return torch.stack([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


def windows_of(text: bytes, count: int, size: int) -> Tensor:
    """`count` stretches of a text, side by side from its middle on if it is long enough -> int64 [count, size]."""
    if len(text) < count * size:
        raise ValueError(f"the text has {len(text)} bytes of {count} times {size}")
    begin = (len(text) - count * size) // 2
    data = torch.frombuffer(bytearray(text[begin : begin + count * size]), dtype=torch.uint8)  # fmt: skip
    return data.long().view(count, size)


def capture(
    windows: int, tokens: int, rows: int, device: str, text: Optional[bytes] = None
) -> Dict[str, Tensor]:
    """`index_inputs` of several windows of a text, on the CPU, each tensor with one more dimension in front: the window."""
    model = MiniDsa.load(CHECKPOINT, device)
    if device != "cpu":
        model = model.bfloat16()
    found = []
    for window in windows_of(text or reference_text(), windows, tokens):
        inputs = index_inputs(model, window.to(device), rows)
        found.append({name: part.cpu() for name, part in inputs.items()})
    return {name: stack([inputs[name] for inputs in found]) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = args.text.read_bytes() if args.text else None
    torch.save(capture(args.windows, args.tokens, args.rows, device, text), args.out)


if __name__ == "__main__":
    main()
