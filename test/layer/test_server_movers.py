"""Index K that comes from elsewhere than a forward pass, or belongs to other weights, in servers on the CPU engine."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checks import check_records, covered, selections
from launches import HICACHE
from safetensors.torch import save_file
from tiny_model import write_tiny_model

from sglang.srt.layers.misa.config import MisaConfig
from sglang_misa.server import misa_args, serve, tokens

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="runs on the CPU engine; see test_server_gpu.py",
    ),
    # One worker runs all the tests of a server.
    pytest.mark.xdist_group("movers"),
]

LAYERS, TOPK = 3, 256
CONFIG = MisaConfig("sampled", 8, decode="misa")
# The layer in the middle takes over what the first one selected, and has no indexer of its own.
SHARING = "--json-model-override-args", json.dumps({"index_topk_pattern": "FSF"})
WITH_INDEXER = {0, 2}


def write_adapter(path, layers, rank=8, hidden=256, heads=4, dim=64):
    """A LoRA adapter of the attention's output, strong enough to change what is said."""
    path.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    config["target_modules"] = ["o_proj"]
    (path / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        for part, shape in (("A", (rank, heads * dim)), ("B", (hidden, rank))):
            weight = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            weights[f"{name}.lora_{part}.weight"] = weight.to(torch.bfloat16)
    save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    """16 pages on the device, 32 on the host; a prompt of the tests takes 8, with what it says."""
    folder = tmp_path_factory.mktemp("server")
    adapter = folder / "adapter"
    write_adapter(adapter, LAYERS)
    with serve(
        tiny_model("deepseek_v32", LAYERS, TOPK),
        folder,
        *misa_args(CONFIG),
        *HICACHE,
        *SHARING,
        *("--lora-paths", f"adapter={adapter}", "--lora-backend", "torch_native"),
        *("--max-total-tokens", "1024", "--chunked-prefill-size", "256"),
    ) as running:
        yield running


@pytest.fixture
def fresh(server):
    server.reset()
    return server


PROMPT, NEW, LAST = 490, 20, 509
# Without the last token, in whole pages.
CACHED = 448


def fill(server, *seeds):
    """Other prompts take the place."""
    for seed in seeds:
        server.generate(tokens(PROMPT, seed), 1)


def asked(server, seed=0, **body):
    """The answer to a prompt and what the indexers recorded of it."""
    server.forget()
    answer = server.generate(tokens(PROMPT, seed), NEW, **body)
    records = server.records()
    check_records(records, CONFIG, TOPK)
    assert set(covered(records)) == WITH_INDEXER
    return answer, records


def held(answer):
    """The tokens of a prompt that were found on the device and on the host."""
    details = answer["meta_info"].get("cached_tokens_details") or {}
    return details.get("device", 0), details.get("host", 0)


def same(one, other, first):
    """Whether two answers, and what was selected for the rows from `first` on, are the same bit for bit."""
    chosen = [selections(records, first, LAST) for _, records in (one, other)]
    texts = [answer["output_ids"] for answer, _ in (one, other)]
    return texts[0] == texts[1] and torch.equal(*chosen)


def test_index_k_comes_back_from_the_host(fresh):
    cold = asked(fresh)
    assert held(cold[0]) == (0, 0)
    fill(fresh, 1, 2)
    # They took its pages on the device.
    loaded = asked(fresh)
    assert held(loaded[0]) == (0, CACHED)
    assert same(loaded, cold, first=CACHED + 1)
    again = asked(fresh)
    assert held(again[0]) == (CACHED, 0)
    assert same(again, cold, first=CACHED + 1)
    # And now those on the host.
    fill(fresh, *range(3, 8))
    gone = asked(fresh)
    assert held(gone[0]) == (0, 0)
    assert same(gone, cold, first=TOPK + 1)


def test_loads_beside_decodes(fresh):
    """Prefixes are loaded while others decode and are evicted."""
    seeds = 0, 1, 2, 3
    cold = [fresh.generate(tokens(PROMPT, seed), NEW) for seed in seeds]
    fresh.forget()
    with ThreadPoolExecutor(2) as threads:
        again = [
            threads.submit(fresh.generate, tokens(PROMPT, seed), NEW) for seed in seeds
        ]
        again = [answer.result() for answer in again]
    check_records(fresh.records(), CONFIG, TOPK)
    assert sum(held(answer)[1] for answer in again) >= 2 * CACHED
    for before, after in zip(cold, again):
        assert after["output_ids"] == before["output_ids"]


def test_adapters(fresh):
    """A LoRA adapter has prefixes of its own, in the cache and on the host."""
    plain = asked(fresh)
    adapted = asked(fresh, lora_path="adapter")
    assert held(adapted[0]) == (0, 0)
    assert adapted[0]["output_ids"] != plain[0]["output_ids"]
    fill(fresh, 1, 2)
    for first, lora in ((plain, {}), (adapted, {"lora_path": "adapter"})):
        loaded = asked(fresh, **lora)
        assert held(loaded[0]) == (0, CACHED)
        assert same(loaded, first, first=CACHED + 1)


def test_memory_that_is_given_back(fresh):
    before = asked(fresh)
    fresh.post("/release_memory_occupation")
    fresh.post("/resume_memory_occupation")
    after = asked(fresh)
    assert held(after[0]) == (0, 0)
    assert same(after, before, first=TOPK + 1)


def test_other_weights(fresh, tmp_path):
    path = fresh.info["model_path"]
    before = asked(fresh)
    write_tiny_model(tmp_path, layers=LAYERS, index_topk=TOPK, seed=1)
    fresh.post("/update_weights_from_disk", model_path=str(tmp_path))
    other = asked(fresh)
    assert held(other[0]) == (0, 0)
    assert other[0]["output_ids"] != before[0]["output_ids"]
    fresh.post("/update_weights_from_disk", model_path=path)
    after = asked(fresh)
    assert held(after[0]) == (0, 0)
    assert same(after, before, first=TOPK + 1)
