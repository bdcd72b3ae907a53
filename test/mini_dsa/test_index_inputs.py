"""What is captured of mini-DSA's indexers is what they score with, up to FP8."""

import pytest
import torch
from mini_dsa.index_inputs import CHECKPOINT, capture, reference_text, windows_of
from mini_dsa.model import Attention, MiniDsa, index_scores

from sglang.srt.layers.misa import reference

WINDOWS, TOKENS, ROWS = 2, 256, 16


@pytest.fixture(scope="module")
def captured():
    return capture(WINDOWS, TOKENS, ROWS, "cpu")


def test_shapes(captured):
    shapes = {name: tuple(tensor.shape) for name, tensor in captured.items()}
    assert shapes == {
        "q": (WINDOWS, 4, ROWS, 64, 128),
        "weights": (WINDOWS, 4, ROWS, 64),
        "k": (WINDOWS, 4, TOKENS, 128),
        "k_scale": (WINDOWS, 4, TOKENS),
    }
    for name in ("q", "k"):
        assert captured[name].dtype == torch.float8_e4m3fn
    scale = captured["k_scale"].log2()
    assert torch.equal(scale, scale.round())  # as SGLang quantizes this model


def test_scores_are_the_models(captured, monkeypatch):
    """Every layer's scores, which the rotation before FP8 does not change."""
    model = MiniDsa.load(CHECKPOINT)
    given = []

    def call(self, q, k, index_k, queries):
        q, weights = queries(torch.arange(TOKENS))
        given.append((q, index_k, weights))
        return q.new_zeros(())

    monkeypatch.setattr(Attention, "index_loss", call)
    tokens = windows_of(reference_text(), WINDOWS, TOKENS)[1]
    with torch.no_grad():
        model(tokens[None], "sparse")
    assert len(given) == 4
    for layer, (q, k, weights) in enumerate(given):
        expected = index_scores(q[:, -ROWS:], weights[:, -ROWS:], k)[0]
        parts = [captured[name][1, layer] for name in ("q", "weights", "k", "k_scale")]
        scores = reference.token_scores(*parts)
        difference = (scores - expected).norm() / expected.norm()
        assert difference < 0.05, f"layer {layer}"


def test_the_text_is_long_enough_for_128k():
    text = reference_text()
    windows = windows_of(text, 4, 32768)
    assert windows.shape == (4, 32768) and len(windows.unique(dim=0)) == 4
    assert bytes(windows.flatten().tolist()) in text
    with pytest.raises(ValueError, match="has 5 bytes"):
        windows_of(b"short", 1, 6)
