"""MISA in a prefill and a decode server on the CPU engine: index K is SGLang's to send."""

import pytest
import torch
from checks import check_records
from pd import is_part, keys_of, serve_pair

from sglang.srt.layers.misa.config import MisaConfig
from sglang_misa.server import misa_args, tokens

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs on the CPU engine; see test_server_gpu.py"
)

LAYERS, TOPK = 2, 256
CONFIG = MisaConfig("sampled", 8, decode="misa")


def test_prefill_and_decode_servers(tiny_model, tmp_path):
    with serve_pair(
        tiny_model("glm_moe_dsa", LAYERS, TOPK),
        tmp_path,
        "mooncake",
        *misa_args(CONFIG),
        prefill=("--chunked-prefill-size", "256"),
        decode=("--max-total-tokens", "1024", "--num-reserved-decode-tokens", "16"),
    ) as pair:
        first = pair.ask(tokens(700), 20).result()
        # The prefill server has it in its radix cache now.
        again = pair.ask(tokens(700), 20).result()
        assert len(first["output_ids"]) == 20
        assert first["output_ids"] == again["output_ids"]
        # Two are let in and outgrow the cache: one is moved to the host, and back.
        answers = [pair.ask(tokens(300, seed), 330) for seed in (1, 2)]
        assert all(len(x.result()["output_ids"]) == 330 for x in answers)
        assert "#retracted_reqs: 1" in pair.decode.log.read_text(), "none was retracted"
        computed, received = pair.prefill.records(), pair.decode.records()
    for records in (computed, received):
        check_records(records, CONFIG, TOPK)
    assert not any(record["decode"] for record in computed)
    assert all(record["decode"] for record in received)
    sent, arrived = keys_of(computed), keys_of(received)
    assert set(sent) == set(arrived) and len(sent) == pair.count * LAYERS
    assert all(is_part(keys, arrived[at]) for at, keys in sent.items())
