"""MISA in a server on a GPU, with the kernels: selections are those defined, up to ties."""

import base64
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checks import check_record, check_speculation, prompt_rows
from launches import HICACHE as COOKBOOK_HICACHE
from marks import needs_gpu
from pd import is_part, keys_of, serve_pair
from soak import soak

from sglang.srt.layers.misa.config import MisaConfig
from sglang_misa.server import chain, misa_args, serve, tokens

pytestmark = needs_gpu

LAYERS, TOPK = 3, 2048
PROMPTS = (100, 3000, 32000)
FAMILIES = ["deepseek_v32", "glm_moe_dsa"]
CONFIGS = {
    "single": MisaConfig(),
    "hierarchical": MisaConfig(rerank_candidates=4096, decode="misa"),
    "min-context": MisaConfig(min_context=20000, decode="misa"),
    "pooled": MisaConfig("pooled", block_size=1024, decode="misa"),
    "pooled, hierarchical": MisaConfig(
        "pooled", block_size=1024, rerank_candidates=8192, decode="misa"
    ),
}
# What SGLang's own indexer selects is recorded as positions only.
POSITIONS = {"SGLANG_DSA_FUSE_TOPK": "false"}
GRAPHS = {
    "sampled": MisaConfig(decode="misa"),
    "pooled": CONFIGS["pooled"],
}


def some_rows(record, count=96):
    """Every name in a record, with a spread of its rows: the definition routes one row at a time."""
    rows = len(record["q"])
    chosen = torch.linspace(0, rows - 1, min(rows, count)).long()
    names = "q", "weights", "lengths", "heads", "shared_q", "shared_scale", "positions"
    return {
        name: value[chosen] if name in names and value is not None else value
        for name, value in record.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", CONFIGS)
def test_selects_as_defined(family, variant, tiny_model, tmp_path):
    config = CONFIGS[variant]
    with serve(
        tiny_model(family, LAYERS, TOPK),
        tmp_path,
        *misa_args(config),
        "--disable-cuda-graph",
        env=POSITIONS,
    ) as server:
        for count in PROMPTS:
            cold = server.generate(tokens(count), 70)
            server.forget()
            hit = server.generate(tokens(count), 70)
            assert len(cold["output_ids"]) == len(hit["output_ids"]) == 70
            assert hit["meta_info"]["cached_tokens"] == (count - 1) // 64 * 64
            check_all(server, config)
            server.reset()
            server.generate(tokens(count), 2)
            check_all(server, config)


def check_all(server, config):
    paths = sorted(server.capture_dir.glob("*.pt"))
    assert paths, "the indexer recorded nothing"
    for path in paths:
        record = torch.load(path, map_location="cuda")
        check_record(some_rows(record), config, TOPK, exact=False)


def selected_positions(answer):
    """What SGLang itself captured of a request's selections -> [tokens - 1, layers, topk]."""
    data = base64.b64decode(answer["meta_info"]["indexer_topk"])
    data = torch.frombuffer(bytearray(data), dtype=torch.int32)
    return data.view(-1, LAYERS, TOPK)


def overlap(one, other):
    one, other = (set(x[x >= 0].tolist()) for x in (one, other))
    return len(one & other) / len(one | other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", GRAPHS.values(), ids=GRAPHS.keys())
def test_decode_in_cuda_graphs(config, family, tiny_model, tmp_path):
    model, prompt, outputs = tiny_model(family, LAYERS, TOPK), tokens(2300), {}
    for name, env in (("slots", {}), ("positions", POSITIONS)):
        with serve(
            model,
            tmp_path / name,
            *misa_args(config),
            # The recorder sees eager calls only: prefill here, while decode runs in full graphs.
            *("--cuda-graph-backend-prefill", "disabled"),
            "--enable-return-indexer-topk",
            env=env,
        ) as server:
            answer = server.generate(prompt, 140, return_indexer_topk=True)
            outputs[name] = answer["output_ids"]
            assert "cuda graph: True" in server.log.read_text()
            whole = prompt + outputs[name]
            # The means of the pages that were completed inside the graph, as a prefix hit finds them.
            server.forget()
            hit = server.generate(whole, 1)
            assert hit["meta_info"]["cached_tokens"] == 2432
            check_all(server, config)
            if name == "slots":
                continue
            # The embeddings are those of a cold prefill, and so are, up to rounding, the first layer's selections.
            server.reset()
            server.generate(whole, 1)
            cold = {
                length: row
                for record in server.records()
                if record["layer_id"] == 0
                for length, row in zip(record["lengths"].tolist(), record["positions"])
            }
            graph = selected_positions(answer)
            overlaps = [overlap(graph[n - 1, 0], cold[n]) for n in range(2301, 2440)]
            print(f"{family}: overlap {min(overlaps):.4f} to {max(overlaps):.4f}")
            # A wrong length or page table gives what chance gives, about 0.8.
            assert sum(overlaps) / len(overlaps) > 0.9
    assert outputs["slots"] == outputs["positions"]


def test_audited_decode_leaves_its_graph(tiny_model, tmp_path):
    """In steps whose number is a multiple of the interval; all others run in graphs."""
    with serve(
        tiny_model("deepseek_v32", LAYERS, TOPK),
        tmp_path,
        *misa_args(MisaConfig(decode="misa")),
        *("--misa-audit-interval", "8", "--enable-metrics"),
        *("--decode-log-interval", "1"),
    ) as server:
        server.generate(tokens(2300), 65)
        (state,) = server.get("/get_server_info").json()["internal_states"]
        log = server.log.read_text()
    steps = [line for line in log.splitlines() if "Decode batch" in line]
    eager = [line for line in steps if "cuda graph: False" in line]
    assert len(steps) >= 64 and len(eager) in (8, 9)
    assert [x["layer"] for x in state["misa_audit"]] == list(range(LAYERS))
    for counts in state["misa_audit"]:
        # Beside decode, the rows of the prompt that see more than TOPK tokens.
        assert counts["rows"] >= 8
        recall = counts["selected"] / counts["tokens"]
        print(f"layer {counts['layer']}: {counts['rows']} rows, recall {recall:.4f}")
        assert 0.5 < recall < 1


@pytest.mark.parametrize(
    "family, config",
    [
        (FAMILIES[0], MisaConfig(rerank_candidates=4096)),
        (FAMILIES[1], CONFIGS["pooled"]),
    ],
    ids=FAMILIES,
)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_speculative_decoding(graph, family, config, tiny_model, tmp_path):
    """Target verify, draft extend and draft decode, with overlap scheduling; eager, every pass is recorded."""
    with serve(
        tiny_model(family, LAYERS, TOPK, nextn=True),
        tmp_path,
        *misa_args(config),
        *chain(3),
        # In bfloat16 the best two tokens are often the same number.
        "--enable-fp32-lm-head",
        *(("--cuda-graph-backend-prefill", "disabled") if graph else ()),
        *(() if graph else ("--disable-cuda-graph",)),
        env={} if graph else POSITIONS,
    ) as server:
        # Three sequences: a graph has padding.
        prompts = [tokens(size, size) for size in (3000, 2300, 5100)]
        records = check_speculation(server, prompts, 140)
        assert ("cuda graph: True" in server.log.read_text()) == graph
        # The last prompts' passes, over what the drafts left.
        check_all(server, config)
    passes = {(r["draft"], len(r["q"])) for r in records if r["decode"]}
    assert passes == (set() if graph else {(False, 4), (True, 4), (True, 1)})
    for record in records[::17]:
        record = {
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in record.items()
        }
        check_record(some_rows(record), config, TOPK, exact=False)


# Layouts of HiCache's memory on the host, what copies, and when; SGLang's cookbook launches the first for these models.
HICACHE = [
    ("deepseek_v32", "page_first_direct", "direct", "write_through"),
    ("glm_moe_dsa", "page_first", "kernel", "write_through"),
    ("deepseek_v32", "layer_first", "kernel", "write_back"),
    ("glm_moe_dsa", "layer_first", "direct", "write_back"),
]


@pytest.mark.parametrize("family, layout, backend, policy", HICACHE)
def test_hicache(family, layout, backend, policy, tiny_model, tmp_path):
    """A prompt that was evicted comes back from the host, while the first layers already select."""
    count, new_tokens, config = 30000, 40, GRAPHS["sampled"]
    with serve(
        tiny_model(family, LAYERS, TOPK),
        tmp_path,
        *misa_args(config),
        *("--enable-hierarchical-cache", "--hicache-ratio", "2"),
        *("--hicache-mem-layout", layout, "--hicache-io-backend", backend),
        *("--hicache-write-policy", policy, "--max-total-tokens", "32768"),
        *("--cuda-graph-backend-prefill", "disabled"),
        env=POSITIONS,
    ) as server:

        def ask(seed):
            server.forget()
            answer = server.generate(tokens(count, seed), new_tokens, "same")
            details = answer["meta_info"].get("cached_tokens_details") or {}
            return answer, details.get("host", 0), keys_of(server.records())

        cold = [ask(seed) for seed in range(2)]
        assert [host for _, host, _ in cold] == [0, 0]
        # Each evicts the other from the device, and the host has room for both.
        for seed in (0, 1, 0):
            answer, host, keys = ask(seed)
            assert host == (count - 1) // 64 * 64
            check_all(server, config)
            assert len(keys) == LAYERS
            for at, (k, k_scale) in cold[seed][2].items():
                assert is_part((k[:host], k_scale[:host]), keys[at])
            assert len(answer["output_ids"]) == new_tokens


TRANSFERS = {"nixl": "nixl", "mooncake_tcp": "mooncake"}


@pytest.mark.parametrize("backend", TRANSFERS)
def test_prefill_and_decode_servers(backend, tiny_model, tmp_path):
    pytest.importorskip(TRANSFERS[backend])
    config = GRAPHS["sampled"]
    with serve_pair(
        tiny_model("deepseek_v32", LAYERS, TOPK),
        tmp_path,
        backend,
        *misa_args(config),
        "--disable-cuda-graph",
        env=POSITIONS,
    ) as pair:
        answers = [pair.ask(tokens(count), 70) for count in (3000, 30000, 3000)]
        assert all(len(answer.result()["output_ids"]) == 70 for answer in answers)
        for server in (pair.prefill, pair.decode):
            check_all(server, config)
        sent, arrived = (keys_of(x.records()) for x in (pair.prefill, pair.decode))
    assert set(sent) == set(arrived) and len(sent) == pair.count * LAYERS
    assert all(is_part(keys, arrived[at]) for at, keys in sent.items())


def test_memory_that_is_given_back(tiny_model, tmp_path):
    """The graphs of decode, the cache and the weights go, and come back; then the weights are loaded again."""
    pytest.importorskip("torch_memory_saver")
    model, prompt = tiny_model("glm_moe_dsa", LAYERS, TOPK), tokens(3000)
    config = GRAPHS["sampled"]
    with serve(
        model,
        tmp_path,
        *misa_args(config),
        *("--cuda-graph-backend-prefill", "disabled", "--enable-memory-saver"),
        env=POSITIONS,
    ) as server:
        before = server.generate(prompt, 140)
        server.post("/release_memory_occupation")
        server.post("/resume_memory_occupation")
        server.post("/update_weights_from_disk", model_path=str(model))
        server.forget()
        after = server.generate(prompt, 140)
        assert after["meta_info"]["cached_tokens"] == 0
        assert after["output_ids"] == before["output_ids"]
        check_all(server, config)


def ask_together(server, sizes, new_tokens):
    """A prompt of each size, all at once: each is answered with so many tokens."""
    with ThreadPoolExecutor(len(sizes)) as threads:
        answers = [
            threads.submit(server.generate, tokens(size, size), new_tokens)
            for size in sizes
        ]
        assert all(len(x.result()["output_ids"]) == new_tokens for x in answers)


def misa_rows(server):
    """Rows that were selected for so far, by how."""
    (state,) = server.get("/get_server_info").json()["internal_states"]
    return Counter(state["misa_rows"])


needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two GPUs of one host"
)
# FlashInfer's fused all-reduce is compiled for minutes when it is first used, and no indexer has a part in it.
TWO_GPUS = "--tp", "2", "--enforce-disable-flashinfer-allreduce-fusion"


@needs_two_gpus
@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel(family, tiny_model, tmp_path):
    """The ranks share the rows of long prompts, and each selects for those of a short extend and of decode."""
    config, size, new_tokens = CONFIGS["hierarchical"], 12000, 5
    with serve(
        tiny_model(family, LAYERS, TOPK),
        tmp_path,
        *misa_args(config),
        *(*TWO_GPUS, "--disable-cuda-graph"),
        env=POSITIONS,
    ) as server:
        # Whether the server is up may have been asked with a prompt.
        server.reset()
        before = misa_rows(server)
        cold = server.generate(tokens(size), new_tokens)
        check_all(server, config)
        one, two = prompt_rows(server.capture_dir)
        assert sorted(one + two) == list(range(1, size + 1))
        assert min(len(one), len(two)) > size // 3
        assert misa_rows(server) - before == Counter(misa=LAYERS * size)
        server.forget()
        hit = server.generate(tokens(size), new_tokens)
        assert hit["meta_info"]["cached_tokens"] == (size - 1) // 64 * 64
        assert len(cold["output_ids"]) == len(hit["output_ids"]) == new_tokens
        check_all(server, config)
        one, two = prompt_rows(server.capture_dir)
        assert one == two == list(range((size - 1) // 64 * 64 + 1, size + 1))


@needs_two_gpus
@pytest.mark.parametrize("family", FAMILIES)
def test_data_parallel_attention(family, tiny_model, tmp_path):
    """With idle ranks, padding rows, and decode in CUDA graphs."""
    config = CONFIGS["hierarchical"]
    with serve(
        tiny_model(family, LAYERS, TOPK),
        tmp_path,
        *misa_args(config),
        *(*TWO_GPUS, "--dp", "2", "--enable-dp-attention"),
        # The recorder sees eager calls only.
        *("--cuda-graph-backend-prefill", "disabled"),
        env=POSITIONS,
    ) as server:
        # The other rank is idle.
        assert len(server.generate(tokens(3000, 1), 20)["output_ids"]) == 20
        sizes = 12000, 2500, 100, 5000, 9000, 64
        ask_together(server, sizes, 20)
        check_all(server, config)
        rows = prompt_rows(server.capture_dir)
        assert len(rows) == 2 and all(rows), "one rank had all prompts"
        assert max(map(max, rows)) == sizes[0]


@needs_two_gpus
@pytest.mark.parametrize("family", FAMILIES)
def test_context_parallel(family, tiny_model, tmp_path):
    """Rows are dealt out to the ranks, one by one."""
    config = CONFIGS["hierarchical"]
    with serve(
        tiny_model(family, LAYERS, TOPK),
        tmp_path,
        *misa_args(config),
        *(*TWO_GPUS, "--enable-prefill-cp", "--cp-strategy", "interleave"),
        "--disable-cuda-graph",
        env=POSITIONS,
    ) as server:
        for size in (2501, 12000):
            # The first time, of a prompt that may have asked whether the server is up.
            server.reset()
            answer = server.generate(tokens(size), 5)
            assert len(answer["output_ids"]) == 5
            check_all(server, config)
            one, two = sorted(prompt_rows(server.capture_dir))
            assert one == list(range(1, size + 1, 2))
            assert two == list(range(2, size + 1, 2))
        server.reset()
        # Several prompts in a chunk: a rank has other rows of each.
        sizes = 2501, 3001, 900, 2200
        ask_together(server, sizes, 5)
        check_all(server, config)


# As SGLang's cookbook launches these models, and what each takes beside it.
SOAKED = {
    "plain": (),
    "EAGLE": chain(3),
    "HiCache": COOKBOOK_HICACHE,
    "TP": TWO_GPUS,
    "TP and EAGLE": (*TWO_GPUS, *chain(3)),
    "DP attention": (*TWO_GPUS, "--dp", "2", "--enable-dp-attention"),
    "CP": (*TWO_GPUS, "--enable-prefill-cp", "--cp-strategy", "interleave"),
}


def check_some(server, config):
    """Some rows of every 25th record."""
    for path in sorted(server.capture_dir.glob("*.pt"))[::25]:
        record = torch.load(path, map_location="cuda")
        check_record(some_rows(record, 16), config, TOPK, exact=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(x, marks=needs_two_gpus if "--tp" in SOAKED[x] else ())
        for x in SOAKED
    ],
)
def test_soak(launch, family, tiny_model, tmp_path):
    """Hundreds of requests in a cache that is too small for those at once, with aborts; SOAK_MINUTES makes it longer.

    A server that is idle ends itself where SGLang finds that a page is lost.
    """
    config, room = CONFIGS["hierarchical"], 16384
    with serve(
        tiny_model(family, LAYERS, TOPK, nextn="EAGLE" in launch),
        tmp_path,
        *misa_args(config),
        *SOAKED[launch],
        *("--max-total-tokens", str(room), "--schedule-conservativeness", "0.1"),
        *("--cuda-graph-backend-prefill", "disabled"),
        env=POSITIONS,
    ) as server:

        outcomes = soak(server, 200, 8000, 8, lambda: check_some(server, config))
        print(launch, family, dict(outcomes))
        assert outcomes["finished"] > outcomes["aborted"] > 0
        server.flush_cache()
        whole = tokens(room - 1024)
        assert len(server.generate(whole, 4)["output_ids"]) == 4


@pytest.mark.parametrize("backend", TRANSFERS)
def test_soak_of_prefill_and_decode_servers(backend, tiny_model, tmp_path):
    pytest.importorskip(TRANSFERS[backend])
    config, room = CONFIGS["hierarchical"], 16384
    with serve_pair(
        tiny_model("deepseek_v32", LAYERS, TOPK),
        tmp_path,
        backend,
        *misa_args(config),
        *("--max-total-tokens", str(room), "--cuda-graph-backend-prefill", "disabled"),
        env=POSITIONS,
    ) as pair:

        def check():
            for server in (pair.prefill, pair.decode):
                check_some(server, config)

        outcomes = soak(pair, 200, 8000, 8, check)
        print(backend, dict(outcomes))
        assert outcomes["finished"] > outcomes["aborted"] > 0
        # The cache of neither has lost a page.
        whole = pair.ask(tokens(room - 1024), 4).result()
        assert len(whole["output_ids"]) == 4
