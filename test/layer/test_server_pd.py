"""MISA in a prefill and a decode server on the CPU engine: index K is SGLang's to send, and to store."""

import time

import pytest
import torch
from checks import check_records
from launches import HICACHE
from pd import is_part, keys_of, serve_pair

from sglang.srt.layers.misa.config import MisaConfig
from sglang_misa.server import misa_args, tokens

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs on the CPU engine; see test_server_gpu.py"
)

LAYERS, TOPK = 2, 256
CONFIG = MisaConfig("sampled", 8, decode="misa")
# Behind the host's memory. A request waits for all that is there.
STORAGE = (
    *("--hicache-storage-backend", "file"),
    *("--hicache-storage-prefetch-policy", "wait_complete"),
)


def test_prefill_and_decode_servers(tiny_model, tmp_path):
    storage, pages = tmp_path / "storage", 700 // 64
    with serve_pair(
        tiny_model("glm_moe_dsa", LAYERS, TOPK),
        tmp_path,
        "mooncake",
        *misa_args(CONFIG),
        prefill=("--chunked-prefill-size", "256", *HICACHE, *STORAGE),
        decode=("--max-total-tokens", "1024", "--num-reserved-decode-tokens", "16"),
        env={"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(storage)},
    ) as pair:
        first = pair.ask(tokens(700), 20).result()
        # A file for the latent keys of a page, another one for its index K.
        while len(list(storage.glob("*.bin"))) < 2 * pages:
            time.sleep(0.1)
        pair.prefill.flush_cache()
        again = pair.ask(tokens(700), 20).result()
        details = again["meta_info"]["cached_tokens_details"]
        assert details["storage"] == pages * 64
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
    for layer in range(LAYERS):
        cold, stored = sent[layer, "1"], sent[layer, "2"]
        assert is_part([x[: pages * 64] for x in cold], stored)
