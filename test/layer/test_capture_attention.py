"""What is recorded of the attention goes with what is recorded of the indexer."""

import torch

from sglang.srt.layers.misa.evaluation.capture import Recorder


def test_attention_goes_with_its_own_rows(tmp_path):
    """Rows that the indexer did not select for leave nothing, though the request has left a record before."""
    recorder = Recorder(str(tmp_path))
    table = torch.arange(4)
    rows = {"layer_id": 1, "rid": "a", "page_table": table}
    recorder.record(
        **rows,
        draft=False,
        decode=False,
        router=None,
        q=torch.zeros(3, 2, 128),
        weights=torch.zeros(3, 2),
        lengths=torch.tensor([121, 122, 123]),
        index_k=torch.zeros(4, 64 * 132, dtype=torch.uint8),
        pooled_keys=None,
        heads=None,
        shared_q=None,
        shared_scale=None,
        positions=torch.zeros(3, 128),
    )
    latent = torch.randn(256, 1, 16)
    given = {"q": torch.randn(3, 2, 16), "latent": latent, "scaling": 0.5}
    recorder.record_attention(**rows, **given, lengths=torch.tensor([60, 61, 62]))
    assert not list(tmp_path.glob("*.attention"))
    recorder.record_attention(**rows, **given, lengths=torch.tensor([121, 122, 123]))
    (path,) = tmp_path.glob("*.attention")
    assert path.with_suffix(".pt").exists()
    record = torch.load(path)
    assert record["lengths"].tolist() == [122]
    assert torch.equal(record["q"], given["q"][1:2])
    assert torch.equal(record["k"], latent[:122, 0])
