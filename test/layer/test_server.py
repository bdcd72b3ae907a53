"""MISA in a server on the CPU engine: scheduler, radix cache, chunked prefill and decode are SGLang's own."""

import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
import torch
from checks import check_records, check_speculation, covered, prompt_rows, selections
from prometheus_client.parser import text_string_to_metric_families

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.config import MisaConfig
from sglang_misa.server import chain, misa_args, serve, tokens

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs on the CPU engine; see test_server_gpu.py"
)

LAYERS, TOPK = 2, 256
SAMPLED = MisaConfig("sampled", 8, decode="misa")
POOLED = MisaConfig("pooled", 8, 256, decode="misa")
FAMILIES = ["deepseek_v32", "glm_moe_dsa"]
# The chunks of a prompt, in whole pages, where it does not come in one go.
SERVERS = [
    ("deepseek_v32", 256, SAMPLED),
    ("deepseek_v32", 512, POOLED),
    ("glm_moe_dsa", 1024, SAMPLED),
    ("glm_moe_dsa", 256, POOLED),
]


def output(answer):
    return answer["output_ids"]


def cached(answer):
    return answer["meta_info"]["cached_tokens"]


@pytest.fixture(
    scope="module",
    params=[
        # One worker runs all the tests of a server.
        pytest.param(
            (family, chunk, config),
            id=f"{family}-{config.router}",
            marks=pytest.mark.xdist_group(f"{family}-{config.router}"),
        )
        for family, chunk, config in SERVERS
    ],
)
def server(request, tiny_model, tmp_path_factory):
    from sglang_cpu_engine.launch import SPAWNS

    family, chunk, config = request.param
    model = tiny_model(family, LAYERS, TOPK)
    folder = tmp_path_factory.mktemp("server")
    # One of them starts as on a GPU: every process gets MISA by itself.
    env = SPAWNS if request.param == SERVERS[0] else None
    with serve(model, folder, *misa_args(config), env=env) as running:
        running.chunks = {"in chunks": chunk, "in one go": 8192}
        running.config = config
        yield running


@pytest.fixture(params=["in chunks", "in one go"])
def fresh(request, server):
    """The server with an empty cache and no records, and chunks of one size."""
    server.reset()
    server.chunk = server.chunks[request.param]
    server.set_chunk(server.chunk)
    return server


def test_prefill_and_decode(fresh):
    # 70 new tokens cross a page edge, wherever the prompt ends.
    fresh.generate(tokens(1500), new_tokens=70)
    records = fresh.records()
    check_records(records, fresh.config, TOPK)
    assert all(r["decode"] == bool((r["lengths"] > 1500).all()) for r in records)
    assert max(len(record["q"]) for record in records) == min(fresh.chunk, 1500)
    # Chunks that end within the first TOPK tokens need no selection. The overlapped scheduler may run one step more.
    first = fresh.chunk + 1 if fresh.chunk <= TOPK else 1
    for layer in range(LAYERS):
        lengths = covered(records)[layer]
        assert lengths - {1500 + 70} == set(range(first, 1500 + 70))


def test_radix_hit(fresh):
    prompt = tokens(930)
    cold = fresh.generate(prompt)
    fresh.forget()
    hit = fresh.generate(prompt)
    assert cached(cold) == 0 and cached(hit) == 896
    records = fresh.records()
    check_records(records, fresh.config, TOPK)
    assert covered(records)[0] - {934} == set(range(897, 934))


def test_extension_of_a_cached_prefix(fresh):
    """Cold or cached, with the same chunk boundaries: the same bits throughout."""
    head = min(fresh.chunk, 1024)
    prompt = tokens(head + 300)
    cold = fresh.generate(prompt)
    cold_records = fresh.records()
    fresh.flush_cache()
    fresh.generate(prompt[:head])
    fresh.forget()
    warm = fresh.generate(prompt)
    assert cached(warm) == head
    warm_records = fresh.records()
    check_records(warm_records, fresh.config, TOPK)
    if head == fresh.chunk:
        assert output(warm) == output(cold)
        rows = head + 1, head + 300
        assert torch.equal(
            selections(warm_records, *rows), selections(cold_records, *rows)
        )


def test_batch_of_prompts_and_decodes(fresh):
    """Prompts of all sizes arrive while others decode; --enable-mixed-chunk would put both in one call."""
    sizes = [700, 64, 1100, 1, 300, 257, 256]
    with ThreadPoolExecutor(len(sizes)) as threads:
        answers = []
        for seed, size in enumerate(sizes):
            answers.append(threads.submit(fresh.generate, tokens(size, seed), 24))
            time.sleep(0.1)
        assert all(len(output(answer.result())) == 24 for answer in answers)
    records = fresh.records()
    check_records(records, fresh.config, TOPK)
    assert covered(records)[0] >= set(range(1001, 1124))


def test_flush_cache_and_reuse_of_pages(fresh):
    prompt = tokens(700)
    before = fresh.generate(prompt, 20)
    first = fresh.records()
    fresh.flush_cache()
    fresh.generate(tokens(1100, seed=1))
    fresh.reset()
    after = fresh.generate(prompt, 20)
    again = fresh.records()
    assert cached(after) == 0 and output(after) == output(before)
    check_records(again, fresh.config, TOPK)
    rows = 501, 719
    assert torch.equal(selections(again, *rows), selections(first, *rows))


def test_abort_in_mid_prefill(fresh):
    if fresh.chunk > 1024:
        pytest.skip("a prompt in one chunk has no middle")
    prompt = tokens(1100)
    before = fresh.generate(prompt, 20)
    first = fresh.records()
    fresh.reset()
    with ThreadPoolExecutor(1) as thread:
        doomed = thread.submit(fresh.generate, prompt + tokens(6000, 1), 1, "doomed")
        while not any(fresh.capture_dir.glob("*.pt")):
            time.sleep(0.02)
        fresh.post("/abort_request", rid="doomed")
        assert doomed.result()["meta_info"]["finish_reason"]["type"] == "abort"
    aborted = fresh.records()
    assert max(covered(aborted)[0]) < 7100, "the prompt was finished, not aborted"
    check_records(aborted, fresh.config, TOPK)
    fresh.reset()
    after = fresh.generate(prompt, 20)
    again = fresh.records()
    assert output(after) == output(before)
    check_records(again, fresh.config, TOPK)
    rows = 901, 1119
    assert torch.equal(selections(again, *rows), selections(first, *rows))


HIERARCHICAL = {"active_heads": 4, "rerank_candidates": 512}
SETTINGS = {**HIERARCHICAL, "min_context": 700}


@pytest.mark.parametrize(
    "family, config",
    [
        ("deepseek_v32", replace(POOLED, **SETTINGS)),
        ("glm_moe_dsa", replace(SAMPLED, **SETTINGS, decode="dsa")),
    ],
    ids=FAMILIES,
)
def test_other_settings_in_mixed_chunks(family, config, tiny_model, tmp_path):
    with serve(
        tiny_model(family, LAYERS, TOPK),
        tmp_path,
        *misa_args(config),
        *("--chunked-prefill-size", "512", "--enable-mixed-chunk"),
        *("--enable-metrics", "--misa-audit-interval", "1"),
    ) as server:
        info, metrics = server.info, server.metrics()
        given, size = dict(info["misa"]), info["misa"]["pooled_keys_bytes"]
        del given["pooled_keys_bytes"]
        assert given == asdict(config)
        assert f"MISA is on. {config}" in server.log.read_text()
        assert server.variant() == {
            "variant": "misa-hierarchical",
            "active_heads": config.active_heads,
            "block_size": config.block_size or 0,
            "rerank_candidates": config.rerank_candidates,
            "router": config.router,
        }
        for name in ("active_heads", "rerank_candidates", "min_context"):
            assert metrics[f"sglang:misa_{name}"] == getattr(config, name)
        assert metrics.get("sglang:misa_block_size") == config.block_size
        assert metrics["sglang:misa_pooled_keys_bytes"] == size
        assert (size > 0) == config.pools_keys
        with ThreadPoolExecutor(3) as threads:
            first = threads.submit(server.generate, tokens(600, 1), 24)
            # The others come while it decodes.
            while not any(605 in record["lengths"] for record in server.records()):
                time.sleep(0.1)
            others = [
                threads.submit(server.generate, tokens(size, size), 6)
                for size in (1300, 900)
            ]
            assert all(a.result() for a in (first, *others))
        records, state = server.records(), server.get("/get_server_info").json()
        exported = server.get("/metrics").text
        check_audit(server)
    check_records(records, config, TOPK)
    assert any(r["heads"] is not None for r in records)
    assert any(r["decode"] for r in records)
    # Nothing but these requests; decode of its own is not counted.
    paths = dict.fromkeys(("misa", "all_heads", "dsa"), 0)
    for record in records:
        if record["decode"]:
            continue
        path = "all_heads" if record["heads"] is None else "misa"
        paths["dsa" if record["router"] is None else path] += len(record["q"])
    assert state["internal_states"][0]["misa_rows"] == paths
    assert all(paths.values())
    found = {
        sample.labels["path"]: sample.value
        for family in text_string_to_metric_families(exported)
        for sample in family.samples
        if sample.name == "sglang:misa_rows_total"
    }
    assert found == paths
    labels = f'decode="{config.decode}"', f'router="{config.router}"'
    (line,) = [x for x in exported.splitlines() if x.startswith("sglang:misa_info{")]
    assert all(label in line for label in labels)


def audited(server):
    """What the server's audits counted in each layer: rows, tokens, those selected, and the rows of each head."""
    (state,) = server.get("/get_server_info").json()["internal_states"]
    return {
        x["layer"]: torch.tensor([x["rows"], x["tokens"], x["selected"], *x["heads"]])
        for x in state["misa_audit"]
    }


def counted(record):
    """The same of a record, by the reference."""
    q, weights, k, k_scale, lengths = (
        record[name] for name in ("q", "weights", "k", "k_scale", "lengths")
    )
    wanted = reference.dsa(q, weights, k, k_scale, lengths, TOPK)
    wanted, chosen = (
        reference.members(x.long(), len(k)) for x in (wanted, record["positions"])
    )
    rows = torch.tensor([len(q), wanted.sum(), (wanted & chosen).sum()])
    heads = torch.bincount(record["heads"].flatten(), minlength=q.shape[1])
    return torch.cat([rows, heads])


def check_audit(server):
    """All of a few rows are audited: what is exported is what the reference counts."""
    before = audited(server)
    assert len(before) == LAYERS and all(counts[0] > 0 for counts in before.values())
    server.forget()
    # As much of it as an earlier prompt had in whole pages is cached.
    answer = server.generate(tokens(1300, 1300)[:1290], 3)
    assert cached(answer) == 1280
    after, exported = audited(server), server.get("/metrics").text
    values = {
        (sample.name.removeprefix("sglang:misa_audit_"), sample.labels["layer"])
        + ((sample.labels["misa"],) if "misa" in sample.labels else ()): sample.value
        for family in text_string_to_metric_families(exported)
        for sample in family.samples
        if sample.name.startswith("sglang:misa_audit_")
    }
    records = [record for record in server.records() if record["heads"] is not None]
    assert len(records[0]["q"]) == 10
    for layer in range(LAYERS):
        found = [counted(x) for x in records if x["layer_id"] == layer]
        assert torch.equal(after[layer] - before[layer], sum(found))
        rows, wanted, selected, *heads = after[layer].tolist()
        _, last_wanted, last_selected, *_ = found[-1].tolist()
        assert selected < wanted, "a comparison with itself would show nothing"
        assert values["recall", str(layer)] == last_selected / last_wanted
        assert values["rows_total", str(layer)] == rows
        assert values["tokens_total", str(layer), "selected"] == selected
        assert values["tokens_total", str(layer), "missed"] == wanted - selected
        assert values["heads", str(layer)] == sum(n > 0 for n in heads)
        assert values["busiest_head", str(layer)] == max(heads) / rows
    assert "MISA audit, #row: 20, recall: " in server.log.read_text()


@pytest.mark.parametrize(
    "family, config, steps",
    [
        (FAMILIES[0], replace(SAMPLED, decode="dsa", **HIERARCHICAL), 3),
        (FAMILIES[1], POOLED, 1),
    ],
    ids=FAMILIES,
)
def test_speculative_decoding(family, config, steps, tiny_model, tmp_path):
    """The tokens are those that the model predicts, and every pass selects as defined."""
    with serve(
        tiny_model(family, LAYERS, TOPK, nextn=True),
        tmp_path,
        *misa_args(config),
        *chain(steps),
        *("--chunked-prefill-size", "512"),
    ) as server:
        prompts = [tokens(size, size) for size in (300, 530)]
        records = check_speculation(server, prompts, 70)
    verified = defaultdict(set)
    for r in records:
        if r["decode"] and not r["draft"]:
            verified[r["rid"]].update(r["lengths"].tolist())
    # The rows of all new tokens but the last, and those of drafts behind them.
    for prompt, lengths in zip(prompts, sorted(verified.values(), key=min)):
        first = len(prompt) + 1
        assert min(lengths) == first and lengths >= set(range(first, first + 69))
    # One row a sequence in draft decode, of which there is none with a single draft.
    passes = {(r["draft"], len(r["q"])) for r in records if r["decode"]}
    several = {(False, steps + 1), (True, steps + 1)}
    assert passes == several | ({(True, 1)} if steps > 1 else set())
    # Every pass, some steps of each request: the definition routes one row at a time.
    check_records(records[::7], config, TOPK)


@pytest.mark.parametrize(
    "family, config", [(FAMILIES[0], SAMPLED), (FAMILIES[1], POOLED)], ids=FAMILIES
)
def test_retraction(family, config, tiny_model, tmp_path):
    """Requests that outgrow the cache are retracted, and their pages filled by others."""
    with serve(
        tiny_model(family, LAYERS, TOPK),
        tmp_path,
        *misa_args(config),
        *("--chunked-prefill-size", "512", "--schedule-conservativeness", "0.01"),
        *("--max-total-tokens", "1152"),
    ) as server:
        prompt = tokens(300)
        before = server.generate(prompt, 50)
        first = server.records()
        server.reset()
        with ThreadPoolExecutor(2) as threads:
            # Two are let in, 5 pages each, and want 10 pages each of the 18.
            answers = [
                threads.submit(
                    server.generate, tokens(300, seed), 330, ignore_eos=False
                )
                for seed in (1, 2)
            ]
            assert all(len(output(answer.result())) == 330 for answer in answers)
        assert "#retracted_reqs: 1" in server.log.read_text(), "none was retracted"
        check_records(server.records(), config, TOPK)
        server.forget()
        # Its pages come from what the others left in the radix cache, and are evicted for it.
        after = server.generate(prompt, 50)
        assert cached(after) == 0
        again = server.records()
    assert output(after) == output(before)
    check_records(again, config, TOPK)
    rows = 1, 349
    assert torch.equal(selections(again, *rows), selections(first, *rows))


def test_two_ranks(tiny_model, tmp_path):
    """They share the rows of a long prompt, and each selects for all rows of a short one."""
    size = 2100
    with serve(
        tiny_model("deepseek_v32", LAYERS, TOPK),
        tmp_path,
        *misa_args(SAMPLED),
        *("--tp", "2", "--chunked-prefill-size", "4096"),
        # SGLang wants to be told where there is one NUMA node.
        env={"SGLANG_CPU_OMP_THREADS_BIND": "0|0"},
    ) as server:
        cold = server.generate(tokens(size), 4)
        check_records(server.records(), SAMPLED, TOPK)
        shares = sorted(prompt_rows(server.capture_dir))
        middle = len(shares[0]) + 1
        assert shares == [list(range(1, middle)), list(range(middle, size + 1))]
        (state,) = server.get("/get_server_info").json()["internal_states"]
        assert state["misa_rows"] == {"misa": LAYERS * size, "all_heads": 0, "dsa": 0}
        server.forget()
        hit = server.generate(tokens(size), 4)
        check_records(server.records(), SAMPLED, TOPK)
        rows = list(range(cached(hit) + 1, size + 1))
        assert prompt_rows(server.capture_dir) == [rows, rows]
        assert 0 < len(rows) < 100 and output(hit) == output(cold)
