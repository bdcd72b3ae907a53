"""MISA in a server on a GPU, with the torch operations."""

import random

import pytest
import torch
from checks import check_record
from conftest import needs_gpu
from server import Server

from sglang.srt.layers.misa.config import MisaConfig

pytestmark = needs_gpu

LAYERS, TOPK = 3, 2048
PROMPTS = (100, 3000, 32000)
FAMILIES = ["deepseek_v32", "glm_moe_dsa"]
CONFIGS = {
    "single": MisaConfig(),
    "hierarchical": MisaConfig(rerank_candidates=8192),
}


def tokens(count, seed=0):
    return random.Random(seed).choices(range(2, 250), k=count)


def misa_args(config):
    rerank = str(config.rerank_candidates)
    return "--enable-misa", "--misa-rerank-candidates", rerank


def some_rows(record, count=96):
    """Every name in a record, with a spread of its rows: the definition routes one row at a time."""
    rows = len(record["q"])
    chosen = torch.linspace(0, rows - 1, min(rows, count)).long()
    names = ("q", "weights", "lengths", "heads", "positions")
    return {
        name: value[chosen] if name in names and value is not None else value
        for name, value in record.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", CONFIGS)
def test_selects_as_defined(family, variant, tiny_model, tmp_path):
    config = CONFIGS[variant]
    with Server(
        tiny_model(family, LAYERS, TOPK),
        tmp_path,
        *misa_args(config),
        "--disable-cuda-graph",
    ) as server:
        for count in PROMPTS:
            cold = server.generate(tokens(count), 70)
            server.forget()
            hit = server.generate(tokens(count), 70)
            assert len(cold["output_ids"]) == len(hit["output_ids"]) == 70
            assert hit["meta_info"]["cached_tokens"] == (count - 1) // 64 * 64
            check_all(server, config)
            server.flush_cache()
            server.forget()
            server.generate(tokens(count), 2)
            check_all(server, config)


def check_all(server, config):
    paths = sorted(server.capture_dir.glob("*.pt"))
    for path in paths:
        record = torch.load(path, map_location="cuda")
        check_record(some_rows(record), config, TOPK)


@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs_and_fused_topk_change_nothing(family, tiny_model, tmp_path):
    """Decode inside full CUDA graphs gives the tokens of eager decode; slots give those of positions."""
    model = tiny_model(family, LAYERS, TOPK)
    outputs = {}
    for name, args, env in (
        ("eager", ["--disable-cuda-graph"], {}),
        ("graph", [], {}),
        ("unfused", [], {"SGLANG_DSA_FUSE_TOPK": "false"}),
    ):
        with Server(
            model,
            tmp_path / name,
            *misa_args(MisaConfig()),
            *args,
            capture=False,
            env=env,
        ) as server:
            outputs[name] = [
                server.generate(tokens(count), 140)["output_ids"] for count in PROMPTS
            ]
    assert outputs["graph"] == outputs["eager"]
    assert outputs["unfused"] == outputs["graph"]
