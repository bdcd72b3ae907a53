"""Whole servers side by side: the parts of the benchmark, and its command with two small servers."""

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace

import bench_serving_misa
import pytest
import torch
from serving import records
from serving.client import check_cached
from serving.configurations import (
    EAGLE,
    Configuration,
    Session,
    Workload,
    make_groups,
    make_sessions,
    parse_sweep,
)
from serving.profile import (
    DECODE_STEPS,
    SHOWN,
    part_of,
    profile,
    profiled,
    read_trace,
    shorten,
    show,
)
from slice_model import NAMES, make_config, make_parts, write_slice

TOPK = 256
# A slice that a CPU serves.
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 900,
    "bos_token_id": 899,
    "eos_token_id": 899,
    "pad_token_id": 899,
}
META = {"device": "cpu", "versions": {}, "date": "2026-01-01"}


def test_sweeps():
    heads = "--misa-active-heads", ["4", "8"]
    assert parse_sweep("misa-active-heads=4,8") == heads
    assert parse_sweep("--misa-active-heads=4,8") == heads
    for wrong in ("misa-active-heads", "=4", "x=", "x=4,,8", "x=4,4"):
        with pytest.raises(ValueError, match="name=value,value"):
            parse_sweep(wrong)


def test_configurations():
    sweeps = [parse_sweep("misa-active-heads=4,8"), parse_sweep("page=1,2")]
    groups = make_groups(["dsa", "misa"], sweeps, [None, 2.5])
    # A baseline for each value that is not MISA's own, which are no arguments of it.
    assert [(b.variant, b.options, b.speculative) for b, _ in groups] == [
        ("dsa", ("--page", "1"), None),
        ("dsa", ("--page", "2"), None),
        ("dsa", ("--page", "1"), 2.5),
        ("dsa", ("--page", "2"), 2.5),
    ]
    baseline, (four, eight) = groups[3]
    assert four.options == ("--page", "2", "--misa-active-heads", "4")
    assert eight.label == "misa --page 2 --misa-active-heads 8 EAGLE 2.5"
    assert four.arguments[0] == "--enable-misa"
    # What is swept comes last, so it wins.
    assert four.arguments[-4:] == four.options and set(EAGLE) <= set(four.arguments)
    assert baseline.env == {"SGLANG_SIMULATE_ACC_LEN": "2.5"}
    assert "--enable-misa" not in baseline.arguments
    assert make_groups(["dsa"]) == [(Configuration("dsa"), [])]


def test_sessions():
    cached = {"cached_contexts": [640], "extends": [64, 128], "extend_output": 2}
    plain, turns = make_sessions([512], [8], [3], prompts=10, **cached)
    assert plain == Session((Workload(512, 8, 3),), prompts=30)
    # Whole pages of 64 tokens, and two more.
    assert plain.room == 3 * (576 + 128)
    # A turn begins where the one before it ended, and all conversations stay in the cache.
    assert turns.workloads == (Workload(704, 2, 3, 640), Workload(832, 2, 3, 704))
    assert turns.fill == 640 and turns.room == turns.prompts * (896 + 128)
    assert str(turns.workloads[0]) == "704 (640 cached)/2 x 3"


def test_what_the_cache_held():
    check_cached(Workload(1000, 8, 1), [0, 0, 64])
    check_cached(Workload(1064, 8, 1, 1000), [1000, 1000])
    for workload, cached in (
        (Workload(1000, 8, 1), [0, 1000]),
        (Workload(1064, 8, 1, 1000), [1000, 0]),
    ):
        with pytest.raises(RuntimeError, match="were cached instead of"):
            check_cached(workload, cached)


def test_what_the_caches_keep():
    def room(**info):
        client = SimpleNamespace(info={"max_total_num_tokens": 1000, **info})
        return bench_serving_misa.Running(None, client, None, None).room

    assert room() == 1000
    # The host's memory holds what the device does, and more.
    hicache = {"enable_hierarchical_cache": True}
    assert room(**hicache, hicache_ratio=4.0) == 4000
    assert room(**hicache, hicache_ratio=0.5) == 1000


def test_without_bench_serving(monkeypatch):
    """It ends before it starts a server."""

    def missing():
        raise ModuleNotFoundError("No module named 'datasets'")

    monkeypatch.setattr(bench_serving_misa, "load_bench_serving", missing)
    monkeypatch.setattr(bench_serving_misa, "Benchmark", None)
    with pytest.raises(SystemExit, match="does not load: No module named 'datasets'"):
        bench_serving_misa.main(["--model-path", "model"])


def answer(ttft, tpot, throughput):
    """What bench_serving writes, as far as it is read."""
    known = {*records.VALUES.values(), *records.PERCENTILES.values()}
    known -= {"median_ttft_ms", "median_tpot_ms"}
    return dict.fromkeys(known, 7.0) | {
        "median_ttft_ms": ttft,
        "median_tpot_ms": tpot,
        "total_throughput": throughput,
        "completed": 5,
    }


def make_record(variant, *answers, options=()):
    configuration = Configuration(variant, options)
    about = records.about("slice", configuration, ["--tp", "1"], Workload(8192, 4, 1))
    more = {"active_heads": 8, "baseline": None, "speedup": None, **META}
    return about | more | records.figures(list(answers), 3 * 10**9, gpus=2)


def test_records(tmp_path):
    dsa = make_record("dsa", answer(300.0, 4.0, 90.0), answer(100.0, 2.0, 110.0))
    ours = make_record("misa", answer(100.0, 3.0, 400.0))
    assert (dsa["ttft_ms"], dsa["tpot_ms"], dsa["throughput_tok_s"]) == (200, 3, 50)
    assert dsa["spread_ms"]["ttft_ms"] == [100, 300] and dsa["requests"] == 10
    ours = records.compare(ours, dsa)
    assert ours["speedup"] == {"ttft_ms": 2, "tpot_ms": 1, "throughput_tok_s": 4}
    assert ours["baseline"]["ttft_ms"] == 200
    assert ours["baseline"]["peak_memory_bytes"] == 3 * 10**9

    # Of the same, the later one stays.
    path = tmp_path / "serving.json"
    records.write([dsa, ours], path)
    records.write([ours | {"ttft_ms": 50.0}], path)
    swept = make_record("misa", answer(80.0, 0.0, 1.0), options=("--heads", "4"))
    records.write([records.compare(swept, dsa)], path)
    found = records.read(path)
    assert [record["ttft_ms"] for record in found] == [200, 50, 80]
    rows = records.table(found).splitlines()[4:]
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert [cell[1] for cell in cells] == ["dsa", "misa", "misa --heads 4"]
    assert cells[1][2:4] == ["8192/4 x 1", "50 of 200, **2.00**"]
    # With one new token there is no time of another one.
    assert cells[2][4] == "0" and cells[1][7] == "3.0"


def test_traces(tmp_path):
    path = tmp_path / "a-DECODE.trace.json.gz"

    def write(*events):
        names = "cat", "name", "ts", "dur"
        events = [dict(zip(names, event)) for event in events]
        with gzip.open(path, "wt") as file:
            json.dump({"traceEvents": [{"ph": "M"}, *events]}, file)

    write(
        ("kernel", "sm90_fp8_paged_mqa_logits", 0, 10),
        ("kernel", "nvjet_gemm", 5, 15),
        ("kernel", "nvjet_gemm", 40, 10),
        ("cpu_op", "aten::mm", 0, 1000),
    )
    trace = read_trace(path, steps=2)
    assert trace["kernels"] == [
        ("nvjet_gemm", 1, 12.5),
        ("sm90_fp8_paged_mqa_logits", 0.5, 5),
    ]
    assert (trace["span_us"], trace["busy_us"]) == (25, 15)
    assert trace["parts"] == {"matrix products": 12.5, "indexer": 5}
    write(("cpu_op", "aten::mm", 0, 8))
    assert read_trace(path, steps=1)["kernels"] == [("aten::mm", 1, 8)]
    write(("user", "x", 0, 1))
    with pytest.raises(RuntimeError, match="no kernels"):
        read_trace(path, steps=1)


class ProfiledServer:
    """Writes a trace of each stage once it is asked for and prompts come."""

    def __init__(self):
        self.asked, self.folder = [], None
        self.info = {"tokenizer_path": "none"}

    def flush_cache(self):
        self.asked.append("flush")

    def post(self, path, output_dir, activities, **body):
        self.asked.append((path, body))
        self.folder = Path(output_dir)

    def generate(self, prompts, new_tokens):
        if not self.folder:
            self.asked.append((len(prompts), new_tokens))
            return
        self.asked.append(([len(prompt) for prompt in prompts], new_tokens))
        for stage, us in (("EXTEND", 800), ("DECODE", 80)):
            with gzip.open(self.folder / f"1-TP-0-{stage}.trace.json.gz", "wt") as file:
                event = {"cat": "kernel", "name": "flash_fwd", "ts": 0, "dur": us}
                json.dump({"traceEvents": [event]}, file)
        self.folder = None


def test_profile(monkeypatch):
    prompts = [list(range(300)), list(range(300))]
    monkeypatch.setattr(
        "serving.profile.random_prompts", lambda server, count, tokens: prompts[:count]
    )
    server = ProfiledServer()
    found = profile(server, context=300, chunk=100, sequences=2)
    start = "/start_profile"
    asked = [({"num_steps": n, "profile_by_stage": True}) for n in (1, DECODE_STEPS)]
    # Only the last chunk of one prompt is new, and then nothing but the end of each of two.
    new_tokens = DECODE_STEPS + 4
    assert server.asked == [
        *("flush", (200, 1), (start, asked[0]), ([300], new_tokens)),
        *("flush", (300, 1), (300, 1), (start, asked[1]), ([300, 300], new_tokens)),
    ]
    assert found["prefill"]["span_us"] == 800
    assert found["decode"]["span_us"] == 80 / DECODE_STEPS
    assert "dsa, prefill: 0.80 ms" in show("dsa", found)
    assert "attention               800 us 100.0%" in show("dsa", found)
    workloads = profiled(300, chunk=100, sequences=2)
    assert workloads.keys() == found.keys()
    assert list(map(str, workloads.values())) == [
        "300 (200 cached)/1 x 1",
        f"300 (300 cached)/{DECODE_STEPS} x 2",
    ]
    many = {"kernels": [(str(n), 1, 1) for n in range(2 * SHOWN)], "busy_us": 3}
    assert shorten(many) == many | {"kernels": many["kernels"][:SHOWN]}


def test_profiles_are_kept(tmp_path, monkeypatch):
    """A record of either step of each variant, in the place of those of an earlier run."""

    class Started:
        client = SimpleNamespace(info={"chunked_prefill_size": 8192})

    def found(*arguments):
        asked.append(arguments[1:])
        trace = {"span_us": 3.0, "busy_us": 2.0, "parts": {"other": 2.0}}
        trace["kernels"] = [("a", 1.0, 2.0)]
        return {"prefill": trace, "decode": trace}

    asked, output = [], tmp_path / "profile.json"
    monkeypatch.setattr(bench_serving_misa, "profile", found)
    start = bench_serving_misa.Benchmark
    monkeypatch.setattr(start, "start", lambda *arguments: Started())
    command = ["--model-path", "tiny", "--profile", "--output", str(output)]
    command += ["--variants", "misa", "--contexts", "8192", "131072"]
    command += ["--concurrency", "32", "--logs", str(tmp_path)]
    for _ in range(2):
        assert bench_serving_misa.main(command) == 0
    assert asked == 4 * [(131072, 8192, 32)]
    kept = records.read(output)
    assert [(r["variant"], r["stage"], r["cache_hit"]) for r in kept] == [
        (variant, stage, cached)
        for variant in ("dsa", "misa")
        for stage, cached in (("prefill", 122880), ("decode", 131072))
    ]
    assert kept[0]["kernels"] == [["a", 1.0, 2.0]] and kept[0]["device"]
    arguments = bench_serving_misa.parse_arguments(command[:3])
    assert arguments.output.name.startswith("serving_profile_")


@pytest.mark.parametrize(
    "name, part",
    [
        ("deep_gemm::sm90_fp8_mqa_logits<...>", "indexer"),
        ("route_sampled_64_kernel", "indexer"),
        ("sm90::fwd::sparse_attn_fwd_kernel", "attention"),
        ("fused_moe_kernel", "experts"),
        ("nvjet_tst_128x128", "matrix products"),
        ("vectorized_elementwise_kernel", "other"),
    ],
)
def test_parts_of_a_step(name, part):
    assert part_of(name) == part


@pytest.mark.parametrize("name", NAMES)
def test_slices(name, tmp_path):
    from safetensors import safe_open
    from transformers import AutoTokenizer

    config = make_config(name, 2)
    whole = config["n_routed_experts"] * config["moe_intermediate_size"]
    # An eighth of the experts' width, or of the experts.
    assert whole * 8 == 256 * 2048
    assert config["num_attention_heads"] in (
        (16, 128) if "deepseek" in name else (8, 64)
    )
    config |= SMALL
    dense, moe, nextn = make_parts(config, "cpu")
    assert dense["lm_head.weight"].shape == (900, 256)
    assert dense["model.layers.0.mlp.up_proj.weight"].shape == (320, 256)
    expert = "model.layers.1.mlp.experts.7.down_proj.weight"
    assert moe[expert].shape == (256, 64)
    assert moe[expert].float().std() * 64**0.5 == pytest.approx(1, abs=0.1)
    assert moe["model.layers.1.mlp.shared_experts.up_proj.weight"].shape == (64, 256)
    assert nextn["model.layers.2.eh_proj.weight"].shape == (256, 512)
    attention = {key.split(".", 3)[3] for key in moe if "self_attn" in key}
    assert attention == {key.split(".", 3)[3] for key in dense if "self_attn" in key}
    assert attention <= {key.split(".", 3)[3] for key in nextn}

    write_slice(tmp_path, config, dummy=False, device="cpu")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {*dense, *moe, *nextn}
    with safe_open(tmp_path / index["weight_map"][expert], "pt") as file:
        assert torch.equal(file.get_tensor(expert), moe[expert])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == 900 and tokenizer.num_special_tokens_to_add() == 0
    assert tokenizer.encode(tokenizer.decode([3, 899, 0])) == [3, 899, 0]


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="its index_topk is the CPU engine's alone"
)
def test_two_servers(tmp_path, monkeypatch, capfd):
    from sglang_cpu_engine.launch import FLAGS

    from sglang.benchmark import serving

    # It sleeps for a second in each of 18 runs.
    quick = {**vars(time), "sleep": lambda seconds: None}
    monkeypatch.setattr(serving, "time", SimpleNamespace(**quick))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model, output = tmp_path / "tiny", tmp_path / "serving.json"
    config = make_config("deepseek-v3.2-tp8", layers=2) | {**SMALL, "index_topk": TOPK}
    write_slice(model, config, dummy=False, device="cpu")
    command = ["--model-path", str(model), "--output", str(output)]
    command += ["--variants", "misa", "--sweep", "misa-active-heads=4"]
    command += "--contexts 320 --outputs 4 --concurrency 2 --prompts 1".split()
    command += "--warm-ups 1 --cached-contexts 256 --extends 64".split()
    command += ["--extend-output", "2", "--logs", str(tmp_path / "logs"), "--"]
    command += [*FLAGS, "--skip-server-warmup"]

    assert bench_serving_misa.main(command) == 0, capfd.readouterr().out
    found = records.read(output)
    workloads = [(320, 0), (320, 256)]
    places = [(r["variant"], r["context"], r["cache_hit"]) for r in found]
    assert sorted(places) == sorted((v, *w) for v in ("dsa", "misa") for w in workloads)
    for record in found:
        assert record["model"] == "tiny" and record["rounds"] == 2
        assert record["ttft_ms"] > 0 and record["tpot_ms"] > 0
        assert record["throughput_tok_s"] > 0 and record["itl_p99_ms"] > 0
        if record["variant"] == "dsa":
            assert record["active_heads"] == 0 and record["baseline"] is None
            continue
        assert record["active_heads"] == 4 and record["rerank_candidates"] == 0
        (dsa,) = (
            r
            for r in found
            if r["variant"] == "dsa"
            and r["context"] == record["context"]
            and r["cache_hit"] == record["cache_hit"]
        )
        assert record["baseline"]["ttft_ms"] == dsa["ttft_ms"]
        assert record["speedup"]["ttft_ms"] == dsa["ttft_ms"] / record["ttft_ms"]
    assert "| misa --misa-active-heads 4 | 320/4 x 2 |" in capfd.readouterr().out

    # All of it is there: no server starts.
    monkeypatch.setattr(bench_serving_misa, "launch", None)
    assert bench_serving_misa.main(command) == 0
    assert records.read(output) == found
