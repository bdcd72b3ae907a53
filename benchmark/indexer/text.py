"""Keys and queries of text: what mini-DSA's indexers see on 32K tokens, made on the spot from its checkpoint."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from sglang.srt.layers.misa.testing.inputs import Inputs

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TOKENS = 32768
WINDOWS = 4


class Text:
    """Sequences of text.

    A longer context than one window is several windows side by side, a shorter one the end of a window. With fewer heads than
    mini-DSA's 64, every other one scores.

    Args:
        captured: q, weights, k, k_scale with the dimensions window and layer in front, as `mini_dsa.index_inputs` saves them.
    """

    def __init__(self, captured: dict):
        self.captured = captured
        self.windows, self.layers, self.tokens = captured["k_scale"].shape
        self.heads = captured["q"].shape[3]

    @classmethod
    def capture(cls, rows: int, text: Path | None = None) -> "Text":
        """From the checkpoint, with queries for up to `rows` rows at the end of a sequence; of a file if one is named."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text.pt"
            command = [sys.executable, "-m", "mini_dsa.index_inputs", str(path)]
            sizes = {"windows": WINDOWS, "tokens": TOKENS, "rows": rows}
            for name, size in sizes.items():
                command += [f"--{name}", str(size)]
            if text is not None:
                command += ["--text", str(text.resolve())]
            # In a process of its own: its package lies in scripts/, and its memory is free again afterwards.
            subprocess.run(command, cwd=SCRIPTS, check=True)
            return cls(torch.load(path))

    def inputs(
        self, rows: int, heads: int, tokens: int, layer: int, sequence: int, device: str
    ) -> Inputs:
        """One sequence of a batch in one of the layers in rotation; other numbers give other windows and layers."""
        count = -(-tokens // self.tokens)
        if count > self.windows:
            raise ValueError(f"there is text of {self.windows * self.tokens} tokens")
        first = sequence + layer // self.layers
        windows = [(first + j) % self.windows for j in range(count)]
        layer %= self.layers

        def part(name, window):
            tensor = self.captured[name][window, layer].to(device)
            if tensor.dtype == torch.float8_e4m3fn:
                return tensor.view(torch.uint8)
            return tensor

        k, k_scale = (
            torch.cat([part(name, window) for window in windows])[-tokens:]
            for name in ("k", "k_scale")
        )
        some = slice(None, None, self.heads // heads)
        q = part("q", windows[-1])[-rows:, some].contiguous()
        weights = part("weights", windows[-1])[-rows:, some].contiguous()
        if len(q) < rows:
            raise ValueError(f"text was captured for {len(q)} rows, not {rows}")
        lengths = torch.arange(tokens - rows + 1, tokens + 1, device=device)
        fp8 = torch.float8_e4m3fn
        return Inputs(q.view(fp8), weights, k.view(fp8), k_scale, lengths)
