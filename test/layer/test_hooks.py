"""Batches as SGLang hands them over: several sequences, padding rows, idle batches, every form of output."""

import functools
import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from checks import check_record
from releases import initialize_tensor_parallel

from sglang.srt.environ import envs
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.layers.misa import (
    hooks,
    indexer,
    operations,
    reference,
    row_sharding,
)
from sglang.srt.layers.misa.batch import rows_up_to
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.evaluation import hooks as evaluation
from sglang.srt.layers.misa.evaluation.capture import load_records
from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE
from sglang.srt.layers.misa.metrics import RowCounts
from sglang.srt.layers.misa.pooled_keys import PooledKeys
from sglang.srt.layers.misa.testing.batches import write_pages
from sglang.srt.layers.misa.testing.inputs import make_inputs
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
from sglang.srt.runtime_context import get_parallel

HEADS, TOPK, START_LAYER, LAYER = 32, 128, 3, 4
CONFIG = MisaConfig("sampled", 3, decode="misa")
POOLED = MisaConfig("pooled", 3, 128, decode="misa")
ROUTERS = pytest.mark.parametrize("config", [CONFIG, POOLED], ids=lambda x: x.router)


class Batch:
    """Sequences of `lengths` tokens in one cache, the last `rows` tokens of each being queries."""

    def __init__(
        self, lengths, rows, device, monkeypatch, forced=(0, 0), config=CONFIG
    ):
        self.sequences = [
            make_inputs("random", r, HEADS, n, seed)
            for seed, (n, r) in enumerate(zip(lengths, rows))
        ]
        pages = [-(-n // PAGE_SIZE) for n in lengths]
        index_k = torch.zeros(1 + sum(pages), PAGE_SIZE * 132, dtype=torch.uint8)
        self.page_table = torch.zeros(len(lengths), max(pages, default=0)).int()
        order = iter((1 + torch.randperm(sum(pages))).tolist())
        for i, inputs in enumerate(self.sequences):
            mine = torch.tensor(
                [next(order) for _ in range(pages[i])], dtype=torch.long
            )
            self.page_table[i, : pages[i]] = mine
            write_pages(index_k, mine, inputs.k, inputs.k_scale)
        index_k, self.page_table = index_k.to(device), self.page_table.to(device)
        pool = SimpleNamespace(
            start_layer=START_LAYER,
            get_index_k_with_scale_buffer=lambda layer_id: index_k,
        )
        if config is not None and config.pools_keys:
            pool.misa_pooled_keys = PooledKeys([torch.zeros(1, 1), index_k])
            slots = torch.arange(len(index_k) * PAGE_SIZE, device=device)
            pool.misa_pooled_keys.update(LAYER - START_LAYER, index_k, slots)
        for module in (hooks, evaluation):
            monkeypatch.setattr(module, "get_token_to_kv_pool", lambda: pool)
        for module in (hooks, evaluation):
            monkeypatch.setattr(module, "active_config", lambda: config)
        self.counts = RowCounts()
        monkeypatch.setattr(hooks, "ROWS", self.counts)
        self.config, self.monkeypatch = config, monkeypatch
        # One rank, as far as anybody asks.
        monkeypatch.setattr(
            get_parallel(),
            "_overrides",
            {"attn_tp_size": 1, "attn_cp_size": 1, "attn_dcp_size": 1},
        )
        self.rids = None
        self.forced = dict(zip(("init_tokens", "local_tokens"), forced))
        self.indexer = SimpleNamespace(
            index_topk=TOPK, num_init_tokens=forced[0], num_local_tokens=forced[1]
        )
        self.device = device
        self.rows = rows
        self.seq_lens = torch.tensor(lengths, dtype=torch.int64)

    def stacked(self, name, padding):
        values = [getattr(inputs, name) for inputs in self.sequences]
        rest = (HEADS, 128) if name == "q" else (HEADS,)
        dtype = torch.float8_e4m3fn if name == "q" else torch.float32
        values.append(torch.ones(padding, *rest).to(dtype))
        # torch.cat has no kernel for float8.
        return torch.cat([v.float() for v in values]).to(dtype).to(self.device)

    def metadata(self, method, offsets=None, unfused=True):
        lengths = [inputs.lengths for inputs in self.sequences]
        lengths = torch.cat(lengths) if lengths else torch.zeros(0)
        cu_rows = torch.tensor([0, *self.rows]).cumsum(0).int().to(self.device)
        return SimpleNamespace(
            get_page_table_64=lambda: self.page_table,
            get_seqlens_expanded=lambda: lengths.int().to(self.device),
            get_seqlens_int32=lambda: self.seq_lens.int().to(self.device),
            get_indexer_seq_len_cpu=lambda: self.seq_lens,
            get_dsa_extend_len_cpu=lambda: list(self.rows),
            topk_transform_method=method,
            force_unfused_topk=unfused,
            attn_metadata=SimpleNamespace(
                topk_indices_offset=offsets, cu_seqlens_q=cu_rows
            ),
        )

    def select_ragged(
        self, padding=0, out=None, weight_padding=0, original=None, **metadata
    ):
        return hooks.select_ragged(
            original,
            self.indexer,
            False,
            SimpleNamespace(rids=self.rids, spec_info=None),
            LAYER,
            self.stacked("q", padding),
            self.stacked("weights", padding + weight_padding)[:, :, None],
            self.metadata(**metadata),
            out,
        )

    def select_paged(self, padding=0, original=None, **metadata):
        return hooks.select_paged(
            original,
            self.indexer,
            SimpleNamespace(rids=self.rids, spec_info=None),
            LAYER,
            self.stacked("q", padding),
            self.stacked("weights", padding)[:, :, None],
            self.metadata(**metadata),
        )

    def expected(self):
        """The reference's positions."""
        options, define = dict(active_heads=3, **self.forced), reference.misa_shared
        if self.config.pools_keys:
            options["block_size"], define = 128, reference.misa
        return torch.cat([define(*s, TOPK, **options) for s in self.sequences])

    def recorded(self, select, tmp_path, padding=0):
        """What `select` returns while it is recorded, and the records; the last `padding` sequences are no requests."""
        recording = evaluation.Recording(tmp_path / "records")
        around = functools.partial(recording.select, hooks.select)
        self.rids = [f"request-{i}" for i in range(len(self.rows) - padding)]
        with self.monkeypatch.context() as patch:
            patch.setattr(hooks, "select", around)
            out = select()
        self.rids = None
        return out, load_records(recording.recorder.directory)

    def check(self, out, select, tmp_path):
        """The positions that `select` returned are those defined: bit for bit on a CPU, up to ties on a GPU."""
        rows = sum(self.rows)
        assert out.dtype == torch.int32
        assert (out[rows:] == -1).all()
        if self.device == "cpu":
            assert torch.equal(out[:rows].long(), self.expected())
        again, records = self.recorded(select, tmp_path)
        assert torch.equal(out, again)
        assert [record["rid"] for record in records] == [
            f"request-{i}" for i in range(len(self.rows))
        ]
        exact = self.device == "cpu"
        for record in records:
            check_record(record, self.config, TOPK, exact=exact, **self.forced)
        positions = torch.cat([record["positions"] for record in records])
        assert torch.equal(positions, out[:rows].cpu())


PAGED, RAGGED = TopkTransformMethod.PAGED, TopkTransformMethod.RAGGED
LENGTHS, EXTENDS = [300, 1, 129, 700], [300, 1, 40, 3]


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("forced", [(0, 0), (4, 70)])
@ROUTERS
def test_extend(config, padding, forced, device, monkeypatch, tmp_path):
    batch = Batch(LENGTHS, EXTENDS, device, monkeypatch, forced, config)

    def select():
        return batch.select_ragged(padding, method=PAGED)

    out = select()
    assert out.shape == (sum(EXTENDS) + padding, TOPK)
    batch.check(out, select, tmp_path)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("forced", [(0, 0), (4, 70)])
@ROUTERS
def test_decode(config, padding, forced, device, monkeypatch, tmp_path):
    batch = Batch(LENGTHS, [1] * 4, device, monkeypatch, forced, config)

    def select():
        return batch.select_paged(padding, method=PAGED)

    out = select()
    assert out.shape == (4 + padding, TOPK)
    batch.check(out, select, tmp_path)


def test_extend_into_the_buffer_of_a_cuda_graph(device, monkeypatch, tmp_path):
    """The buffer and the weights have the padded number of rows, q the real one."""
    batch = Batch(LENGTHS, EXTENDS, device, monkeypatch)
    rows = sum(EXTENDS)

    def select():
        buffer = torch.full((rows + 9, TOPK), -1, dtype=torch.int32, device=device)
        out = batch.select_ragged(out=buffer, weight_padding=9, method=PAGED)
        assert out is buffer
        return out

    batch.check(select(), select, tmp_path)


@pytest.mark.parametrize("rows", [EXTENDS, [1] * 4], ids=["extend", "decode"])
def test_index_k_that_is_on_its_way(rows, device, monkeypatch):
    """HiCache loads the pages of a layer on another stream. SGLang's getter waits for them; here it is the wait that loads."""
    batch = Batch(LENGTHS, rows, device, monkeypatch)
    select = batch.select_ragged if rows is EXTENDS else batch.select_paged
    fake = hooks.get_token_to_kv_pool()
    on_host = fake.get_index_k_with_scale_buffer(LAYER)
    pool = DSATokenToKVPool(
        size=(len(on_host) - 1) * PAGE_SIZE,
        page_size=PAGE_SIZE,
        kv_lora_rank=64,
        dtype=torch.bfloat16,
        qk_rope_head_dim=64,
        layer_num=2,
        device=device,
        index_head_dim=128,
        enable_memory_saver=False,
        kv_cache_dim=128,
        start_layer=START_LAYER,
    )
    on_device = pool.index_k_with_scale_buffer
    on_device[LAYER - START_LAYER].copy_(on_host)
    fake.get_index_k_with_scale_buffer = pool.get_index_k_with_scale_buffer
    expected = select(method=PAGED)
    on_device[LAYER - START_LAYER].zero_()
    pool.layer_transfer_counter = SimpleNamespace(
        wait_until=lambda layer: on_device[layer].copy_(on_host)
    )
    assert torch.equal(select(method=PAGED), expected)
    assert not on_device[0].any(), "waited for another layer"


@ROUTERS
def test_some_rows_are_up_to_min_context(config, device, monkeypatch, tmp_path):
    """The rows that see so few tokens are spread over the batch, and recorded by themselves."""
    config = replace(config, min_context=200)
    batch = Batch(LENGTHS, EXTENDS, device, monkeypatch, config=config)

    def select():
        return batch.select_ragged(method=PAGED)

    out = select()
    assert batch.counts.counts == {"misa": 103, "all_heads": 241, "dsa": 0}
    again, records = batch.recorded(select, tmp_path)
    assert torch.equal(out, again)
    assert [(r["rid"], len(r["q"]), r["heads"] is None) for r in records] == [
        ("request-0", 200, True),
        ("request-1", 1, True),
        ("request-2", 40, True),
        ("request-0", 100, False),
        ("request-3", 3, False),
    ]
    for record in records:
        check_record(record, config, TOPK, exact=device == "cpu")
    few, more, rest, routed, last = (record["positions"] for record in records)
    assert torch.equal(torch.cat([few, routed, more, rest, last]), out.cpu())


@pytest.mark.parametrize("least", [199, 298, 299, 300, 697, 699])
def test_a_row_costs_what_selects_for_it(least, device, monkeypatch):
    """In a batch with rows on either side of min_context, none is scored twice."""
    config = replace(CONFIG, min_context=least, rerank_candidates=192)
    batch = Batch(LENGTHS, EXTENDS, device, monkeypatch, config=config)
    scored = []

    class Spy:
        def __getattr__(self, name):
            def call(**arguments):
                scored.append((name, arguments.get("heads") is None, arguments))
                return getattr(operations.operations(torch.device(device)), name)(
                    **arguments
                )

            return call

    monkeypatch.setattr(indexer, "operations", lambda device: Spy())
    batch.select_ragged(method=PAGED)
    lengths = torch.cat([s.lengths for s in batch.sequences])
    few, more = ((lengths <= least).sum(), (lengths > least).sum())
    rows = [(name, dense, len(given["q"])) for name, dense, given in scored]
    assert rows == [
        ("topk_prefill", True, few),
        ("route_sampled_topk_prefill", True, more),
    ]
    longest = [given["max_context"] for _, _, given in scored]
    assert longest == [int(lengths[lengths <= least].max()), int(lengths.max())]


def test_idle_batches(device, monkeypatch):
    batch = Batch([], [], device, monkeypatch)
    for padding in (0, 4):
        for select in (batch.select_ragged, batch.select_paged):
            out = select(padding, method=PAGED)
            assert out.shape == (padding, TOPK) and (out == -1).all()


@pytest.mark.parametrize("rows, select", [(EXTENDS, "ragged"), ([1] * 4, "paged")])
def test_sequences_that_are_padding(rows, select, device, monkeypatch, tmp_path):
    """With data parallelism an idle rank gets a sequence made up, and one with few requests some more; they are not recorded."""
    batch = Batch(LENGTHS, rows, device, monkeypatch)
    select = getattr(batch, f"select_{select}")
    out, records = batch.recorded(lambda: select(method=PAGED), tmp_path, padding=2)
    assert [record["rid"] for record in records] == ["request-0", "request-1"]
    assert torch.equal(out, select(method=PAGED))
    _, records = batch.recorded(lambda: select(method=PAGED), tmp_path / "idle", 4)
    assert not records


@pytest.mark.parametrize("rows, select", [(EXTENDS, "ragged"), ([1] * 4, "paged")])
def test_fused_output_is_slots(rows, select, device, monkeypatch, tmp_path):
    batch = Batch(LENGTHS, rows, device, monkeypatch)
    select = getattr(batch, f"select_{select}")
    chosen = select(method=PAGED).long()
    with envs.SGLANG_DSA_FUSE_TOPK.override(True):
        out = select(method=PAGED, unfused=False)
        recorded, _ = batch.recorded(
            lambda: select(method=PAGED, unfused=False), tmp_path
        )
    repeats = torch.tensor(rows, device=device)
    table = batch.page_table.long().repeat_interleave(repeats, 0)
    slots = table.gather(1, (chosen // PAGE_SIZE).clamp(min=0)) * PAGE_SIZE
    slots = (slots + chosen % PAGE_SIZE).masked_fill(chosen < 0, -1)
    assert torch.equal(out.long(), slots)
    assert torch.equal(recorded, out)


def test_fused_output_is_offsets_where_keys_are_ragged(device, monkeypatch, tmp_path):
    batch = Batch(LENGTHS, EXTENDS, device, monkeypatch)
    starts = torch.tensor([0, 300, 301, 430]).repeat_interleave(torch.tensor(EXTENDS))
    starts = starts.int().to(device)
    chosen = batch.select_ragged(method=RAGGED)

    def select():
        return batch.select_ragged(method=RAGGED, unfused=False, offsets=starts)

    with envs.SGLANG_DSA_FUSE_TOPK.override(True):
        out = select()
        recorded, _ = batch.recorded(select, tmp_path)
    expected = (chosen + starts[:, None]).masked_fill(chosen < 0, -1)
    assert torch.equal(out, expected)
    assert torch.equal(recorded, out)


def test_sglangs_own_selection_is_recorded(device, monkeypatch, tmp_path):
    batch = Batch(LENGTHS, EXTENDS, device, monkeypatch, config=None)
    recording = evaluation.Recording(tmp_path / "records")
    chosen = torch.randint(100, (sum(EXTENDS), TOPK), dtype=torch.int32, device=device)
    q, weights = batch.stacked("q", 0), batch.stacked("weights", 0)[:, :, None]

    def after(rids, **metadata):
        forward_batch = SimpleNamespace(rids=rids, spec_info=None)
        args = batch.indexer, False, forward_batch, LAYER, q, weights
        recording.after_ragged(chosen, *args, batch.metadata(PAGED, **metadata), None)

    # The warm-up of a CUDA graph, which belongs to no request.
    after(None)
    with envs.SGLANG_DSA_FUSE_TOPK.override(True):
        after(None, unfused=False)
    assert not (tmp_path / "records").exists()
    after(["a", "b", "c", "d"])
    records = load_records(tmp_path / "records")
    assert [record["rid"] for record in records] == ["a", "b", "c", "d"]
    positions = torch.cat([record["positions"] for record in records])
    assert torch.equal(positions, chosen.cpu())
    with envs.SGLANG_DSA_FUSE_TOPK.override(True):
        with pytest.raises(RuntimeError, match="set SGLANG_DSA_FUSE_TOPK=false"):
            after(["a", "b", "c", "d"], unfused=False)
    # What MISA chose is recorded where it chooses.
    monkeypatch.setattr(evaluation, "active_config", lambda: CONFIG)
    after(["e", "f", "g", "h"])
    assert len(load_records(tmp_path / "records")) == 4
    # It leaves a batch of short prompts alone.
    config = replace(CONFIG, min_context=700)
    monkeypatch.setattr(evaluation, "active_config", lambda: config)
    after(["i", "j", "k", "l"])
    *_, record = load_records(tmp_path / "records")
    assert (record["rid"], record["router"], record["heads"]) == ("l", None, None)


class Original:
    """SGLang's own method, and what it was given."""

    def __init__(self):
        self.given = []

    def __call__(self, *args):
        self.given.append(args)
        return "result"


def test_decode_is_left_to_sglang_by_default(device, monkeypatch):
    config = MisaConfig()
    assert config.decode == "dsa"
    batch = Batch(LENGTHS, [1] * 4, device, monkeypatch, config=config)
    original = Original()
    assert batch.select_paged(original=original, method=PAGED) == "result"
    ((indexer, _, layer_id, q, weights, metadata),) = original.given
    assert (indexer, layer_id, q.shape) == (batch.indexer, LAYER, (4, HEADS, 128))
    assert weights.shape == (4, HEADS, 1) and metadata.get_dsa_extend_len_cpu()
    # A prompt is not.
    batch = Batch(LENGTHS, EXTENDS, device, monkeypatch, config=config)
    assert batch.select_ragged(original=original, method=PAGED).shape[1] == TOPK
    assert len(original.given) == 1
    assert batch.counts.counts == {"misa": 344, "all_heads": 0, "dsa": 0}


@pytest.mark.parametrize("min_context, left", [(699, False), (700, True)])
def test_short_prompts_are_left_to_sglang(min_context, left, device, monkeypatch):
    """Where no row of a batch sees more than `min_context` tokens, whatever their number."""
    config = replace(CONFIG, min_context=min_context)
    batch = Batch(LENGTHS, EXTENDS, device, monkeypatch, config=config)
    original, rows = Original(), sum(EXTENDS)
    buffer = torch.full((rows, TOPK), -1, dtype=torch.int32, device=device)
    out = batch.select_ragged(out=buffer, original=original, method=PAGED)
    if not left:
        assert out is buffer and not original.given
        assert batch.counts.counts == {"misa": 1, "all_heads": 343, "dsa": 0}
        return
    assert out == "result"
    ((indexer, dual, _, layer_id, q, weights, metadata, topk_result),) = original.given
    assert topk_result is buffer and dual is False and len(q) == rows
    assert batch.counts.counts == {"misa": 0, "all_heads": 0, "dsa": 344}


def test_all_heads_are_counted(monkeypatch):
    config = MisaConfig("sampled", HEADS)
    batch = Batch(LENGTHS, EXTENDS, "cpu", monkeypatch, config=config)
    batch.select_ragged(method=PAGED)
    assert batch.counts.counts == {"misa": 0, "all_heads": 344, "dsa": 0}


class Group:
    """A group of `ranks`, of which each has its turn in this process."""

    def __init__(self, ranks):
        self.world_size, self.rank_in_group, self.given = ranks, 0, []

    def all_gather(self, own, dim):
        assert dim == 0
        self.given.append(own)
        return torch.cat([own] * self.world_size)


def shared_by(group, monkeypatch):
    """From now on rows are shared, however few."""
    monkeypatch.setattr(row_sharding, "MIN_WORK", 1)
    monkeypatch.setattr(row_sharding, "SHARE_MULTIPLE", 8)
    overrides = {"attn_tp_group": group, "attn_tp_size": group.world_size}
    monkeypatch.setattr(
        get_parallel(), "_overrides", {**get_parallel()._overrides, **overrides}
    )


@pytest.mark.parametrize(
    "config",
    [CONFIG, POOLED, replace(CONFIG, min_context=200), MisaConfig("sampled", HEADS)],
    ids=["sampled", "pooled", "min-context", "all heads"],
)
@pytest.mark.parametrize("ranks, form", [(2, "ragged"), (5, "positions")])
def test_ranks_share_the_rows(config, ranks, form, device, monkeypatch, tmp_path):
    """Together they select, and record, what one rank alone does; every rank counts all rows."""
    batch = Batch(LENGTHS, EXTENDS, device, monkeypatch, (4, 70), config)
    metadata = {"method": PAGED}
    if form == "ragged":
        offsets = torch.arange(sum(EXTENDS), dtype=torch.int32, device=device) * 1000
        metadata = {"method": RAGGED, "unfused": False, "offsets": offsets}
    with envs.SGLANG_DSA_FUSE_TOPK.override(True):
        expected = batch.select_ragged(5, **metadata)
        counts = dict(batch.counts.counts)
        group, records = Group(ranks), []
        shared_by(group, monkeypatch)
        for group.rank_in_group in range(ranks):
            batch.counts.counts = dict.fromkeys(counts, 0)
            folder = tmp_path / str(group.rank_in_group)
            out, mine = batch.recorded(
                lambda: batch.select_ragged(5, **metadata), folder
            )
            assert batch.counts.counts == counts
            assert out.shape == expected.shape and (out[-5:] == -1).all()
            records += mine
    rows = sum(EXTENDS)
    assert torch.equal(torch.cat(group.given)[:rows], expected[:rows])
    seen = [
        (record["rid"], length)
        for record in records
        for length in record["lengths"].tolist()
    ]
    # Of each rank, those that all heads select for come first.
    assert sorted(seen) == [
        (f"request-{i}", length)
        for i, (end, count) in enumerate(zip(LENGTHS, EXTENDS))
        for length in range(end - count + 1, end + 1)
    ]
    for record in records:
        exact = device == "cpu"
        check_record(record, config, TOPK, exact=exact, **batch.forced)


def test_rows_that_are_not_shared(monkeypatch):
    """Few rows, decode, and what is left to SGLang: no rank waits for another."""
    batch = Batch(LENGTHS, EXTENDS, "cpu", monkeypatch)
    group = Group(2)
    shared_by(group, monkeypatch)
    batch.select_ragged(method=PAGED)
    assert len(group.given) == 1
    monkeypatch.setattr(row_sharding, "MIN_WORK", 1 << 26)
    batch.select_ragged(method=PAGED)
    monkeypatch.setattr(row_sharding, "MIN_WORK", 1)
    short = replace(CONFIG, min_context=700)
    batch = Batch(LENGTHS, EXTENDS, "cpu", monkeypatch, config=short)
    shared_by(group, monkeypatch)
    assert batch.select_ragged(original=Original(), method=PAGED) == "result"
    batch = Batch(LENGTHS, [1] * 4, "cpu", monkeypatch)
    shared_by(group, monkeypatch)
    batch.select_paged(method=PAGED)
    assert len(group.given) == 1


def _rank(rank, select, address, results):
    from sglang.srt.distributed.parallel_state import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
    )

    init_distributed_environment(
        world_size=2,
        rank=rank,
        local_rank=rank,
        distributed_init_method=address,
        backend="gloo",
    )
    get_parallel()._overrides.clear()
    initialize_tensor_parallel(rank, 2)
    try:
        results.put((rank, get_parallel().attn_tp_rank, select().tolist()))
    except Exception as error:
        # Else the test waits for it.
        results.put((rank, repr(error)))
    cleanup_dist_env_and_memory()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="forks a process; test_server_gpu.py has two GPUs"
)
def test_two_processes_share_the_rows(monkeypatch, tmp_path):
    """With SGLang's own groups, over gloo."""
    batch = Batch(LENGTHS, EXTENDS, "cpu", monkeypatch)
    expected = batch.select_ragged(method=PAGED).tolist()
    shared_by(Group(2), monkeypatch)
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    address = f"file://{tmp_path / 'rendezvous'}"
    calls = []

    def select():
        """This rank's share is all that it computes."""
        around = hooks.select
        monkeypatch.setattr(
            hooks, "select", lambda *args: calls.append(args[2]) or around(*args)
        )
        out = batch.select_ragged(method=PAGED)
        (part,) = calls
        assert len(part.lengths) == 176 - 8 * (get_parallel().attn_tp_rank == 1)
        return out

    ranks = [
        fork.Process(target=_rank, args=(rank, select, address, results))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=300) for _ in ranks)
    for process in ranks:
        process.join()
    assert found == [(0, 0, expected), (1, 1, expected)]


@pytest.mark.parametrize("length", [0, 8, 9, 100])
def test_rows_up_to(length):
    spans = [range(8, 11), range(5, 10), range(1, 30, 4), range(10, 10)]
    seen = [length for span in spans for length in span]
    assert rows_up_to(spans, length) == sum(x <= length for x in seen)


def test_sglang_is_left_alone_without_misa(monkeypatch):
    monkeypatch.setattr(hooks, "active_config", lambda: None)
    given = []

    def original(*args):
        given.append(args)
        return "result"

    args = tuple(object() for _ in range(8))
    assert hooks.select_ragged(original, *args) == "result"
    assert hooks.select_paged(original, *args[:6]) == "result"
    assert given == [args, args[:6]]


@pytest.mark.parametrize("config", [None, CONFIG], ids=["off", "sampled"])
def test_no_pooled_keys(config, monkeypatch):
    """Neither without MISA nor with the sampled router: nothing has a place for them here."""
    monkeypatch.setattr(hooks, "active_config", lambda: config)
    assert hooks.create_pooled_keys(None, SimpleNamespace()) is None
    assert hooks.clear_pooled_keys(None, SimpleNamespace()) is None
    assert hooks.add_pooled_keys_size(10, SimpleNamespace()) is None
    assert hooks.add_pooled_keys_cell_size(10, None, None, 3) is None
    assert hooks.update_after_store(None, None, None, LAYER, None) is None
    assert hooks.update_after_fused_store(*[None] * 5, LAYER, None) is None


def test_pooled_keys_are_counted(monkeypatch):
    monkeypatch.setattr(hooks, "active_config", lambda: POOLED)
    pages = [torch.zeros(10, 64 * 132, dtype=torch.uint8)] * 3
    pool = SimpleNamespace(index_k_with_scale_buffer=pages)
    hooks.create_pooled_keys(None, pool)
    assert hooks.add_pooled_keys_size(1000, pool) == 1000 + 10 * 3 * 256
    assert hooks.add_pooled_keys_cell_size(1000, None, None, 3) == 1000 + 4 * 3
    hooks.clear_pooled_keys(None, pool)
    assert not hasattr(pool, "misa_pooled_keys")
