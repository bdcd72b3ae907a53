"""Context parallelism that deals rows out: on the metadata that SGLang makes for a rank, its rows are selected for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from checks import check_record
from test_hooks import CONFIG, EXTENDS, LAYER, LENGTHS, PAGED, TOPK, Batch

from sglang.version import __version__ as sglang_version

if sglang_version != "0.5.17":
    pytest.skip("refused with the other releases", allow_module_level=True)

from sglang.kernels.ops.attention.dsa import cp_split
from sglang.srt.environ import envs
from sglang.srt.layers.attention.dsa import utils
from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend
from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend
from sglang.srt.layers.cp import base
from sglang.srt.layers.cp.interleave import InterleaveCPStrategy
from sglang.srt.layers.cp.utils import is_cp_v2_active, prepare_cp_forward
from sglang.srt.layers.misa import hooks
from sglang.srt.layers.misa.batch import extend_batch, extend_rids, extend_spans
from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_parallel


class SplitKernel:
    """SGLang's Triton kernel, on a CPU: `kernel[grid](...)`."""

    def __getitem__(self, _grid):
        return self

    def __call__(self, given, out, sequences, count, cp_size, cp_rank):
        kept, before = 0, 0
        for index, rows in enumerate(given.tolist()):
            mine = len(
                [x for x in range(before, before + rows) if x % cp_size == cp_rank]
            )
            if mine:
                out[kept], sequences[kept] = mine, index
                kept += 1
            before += rows


class Ranks:
    """A batch of `test_hooks`, as SGLang hands it to each rank of a context-parallel group."""

    def __init__(self, batch, size, monkeypatch):
        self.batch, self.size, self.device = batch, size, batch.device
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(base, "_STRATEGY", InterleaveCPStrategy(size))
        monkeypatch.setattr(utils, "is_dsa_enable_prefill_cp", lambda: True)
        published = {
            "dsa_prefill_cp_mode": "round-robin-split",
            "enable_prefill_context_parallel": False,
        }
        published = SimpleNamespace(_fields=published, **published)
        monkeypatch.setattr(get_parallel(), "_config", published)
        if self.device == "cpu":
            name = "dsa_cp_round_robin_split_q_seqs_kernel"
            monkeypatch.setattr(cp_split, name, SplitKernel())

    def become(self, rank):
        overrides = {"attn_tp_size": 1, "attn_cp_size": self.size, "attn_cp_rank": rank}
        self.monkeypatch.setattr(get_parallel(), "_overrides", overrides)

    def forward_batch(self):
        lengths, rows = self.batch.seq_lens, torch.tensor(self.batch.rows)
        forward_batch = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            spec_info=None,
            batch_size=len(lengths),
            seq_lens=lengths.to(self.device),
            seq_lens_cpu=lengths,
            seq_lens_sum=int(lengths.sum()),
            extend_seq_lens=rows.int().to(self.device),
            extend_seq_lens_cpu=rows.tolist(),
            extend_prefix_lens_cpu=(lengths - rows).tolist(),
            req_pool_indices=torch.arange(len(lengths), device=self.device),
            input_ids=torch.zeros(int(rows.sum())),
            attn_cp_metadata=None,
            global_num_tokens_cpu=None,
            rids=self.batch.rids,
        )
        if is_cp_v2_active(forward_batch):
            prepare_cp_forward(forward_batch)
        return forward_batch

    def metadata(self, forward_batch):
        """What SGLang's backend makes of the batch."""
        token = torch.arange(int(self.batch.seq_lens.max()), device=self.device)
        slots = self.batch.page_table[:, token // PAGE_SIZE] * PAGE_SIZE
        backend = object.__new__(DeepseekSparseAttnBackend)
        vars(backend).update(
            device=self.device,
            real_page_size=PAGE_SIZE,
            dsa_index_topk=TOPK,
            dsa_topk_backend=DSATopKBackend.TORCH,
            dsa_prefill_impl="flashmla_sparse",
            dsa_kv_cache_store_fp8=False,
            use_mha=False,
            use_fused_topk=False,
            hisparse_coordinator=None,
            token_to_kv_pool=SimpleNamespace(dtype=torch.bfloat16),
            req_to_token_pool=SimpleNamespace(
                req_to_token=(slots + token % PAGE_SIZE).int()
            ),
            set_dsa_prefill_impl=lambda _: None,
            _arange_buf=torch.arange(4096, device=self.device, dtype=torch.int32),
        )
        backend.init_forward_metadata(forward_batch)
        return backend.get_indexer_metadata(LAYER, forward_batch)

    def select(self, rank, original=None):
        """The result for the rank's rows, which SGLang pads to as many as the others have."""
        self.become(rank)
        forward_batch = self.forward_batch()
        cp_metadata = forward_batch.attn_cp_metadata
        padding = max(cp_metadata.per_rank_actual_token)
        padding -= cp_metadata.per_rank_logical_token[rank]
        q, weights = (self.batch.stacked(name, 0) for name in ("q", "weights"))
        rows = torch.arange(rank, len(q), self.size, device=self.device)
        rows = torch.cat([rows, rows.new_zeros(padding)])
        q = q.view(torch.uint8)[rows].view(q.dtype)
        return hooks.select_ragged(
            original,
            self.batch.indexer,
            False,
            forward_batch,
            LAYER,
            q,
            weights[rows][:, :, None],
            self.metadata(forward_batch),
        )


@pytest.fixture(autouse=True)
def second_version(monkeypatch):
    """SGLang's own choice for these models."""
    with envs.SGLANG_ENABLE_CP_V2.override(True):
        yield


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("min_context", [0, 200])
def test_rows_dealt_out(size, min_context, device, monkeypatch, tmp_path):
    """What one rank selects for all rows, and recorded under the right requests; the third prompt has one row of some ranks."""
    config = replace(CONFIG, min_context=min_context)
    batch = Batch(LENGTHS, EXTENDS, device, monkeypatch, config=config)
    expected = batch.select_ragged(method=PAGED)
    every = [
        (f"request-{i}", length)
        for i, (end, count) in enumerate(zip(LENGTHS, EXTENDS))
        for length in range(end - count + 1, end + 1)
    ]
    ranks = Ranks(batch, size, monkeypatch)
    for rank in range(size):
        own = expected[rank::size]
        out, records = batch.recorded(lambda: ranks.select(rank), tmp_path / str(rank))
        assert torch.equal(out[: len(own)], own)
        assert (out[len(own) :] == -1).all()
        seen = [(r["rid"], n) for r in records for n in r["lengths"].tolist()]
        assert sorted(seen) == sorted(every[rank::size])
        for record in records:
            check_record(record, config, TOPK, exact=device == "cpu")


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_what_the_host_knows(size, device, monkeypatch):
    """Is what the device does, for any batch; of its sequences a rank may have none."""
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        rows = (torch.rand(5, generator=rng) ** 4 * 40).long() + 1
        lengths = rows + torch.randint(3, (5,), generator=rng) * 50
        batch = SimpleNamespace(
            seq_lens=lengths,
            rows=rows.tolist(),
            device=device,
            rids=list("abcde"),
            page_table=torch.zeros(5, 4, dtype=torch.int32, device=device),
        )
        batch.page_table += torch.arange(5, device=device)[:, None]
        monkeypatch.setattr(get_parallel(), "_overrides", {})
        ranks, left = Ranks(batch, size, monkeypatch), 0
        for rank in range(size):
            ranks.become(rank)
            forward_batch = ranks.forward_batch()
            metadata = ranks.metadata(forward_batch)
            found = extend_batch(forward_batch, metadata)
            spans = extend_spans(forward_batch, metadata)
            assert found.lengths.tolist() == [x for span in spans for x in span]
            assert found.rows == metadata.get_dsa_extend_len_cpu()
            assert found.cu_rows.diff().tolist() == found.rows
            ends = found.lengths.tolist()
            assert found.bounds == (min(ends, default=0), max(ends, default=0))
            rids = extend_rids(forward_batch)
            # The pages of sequence i are all page i.
            assert ["abcde"[i] for i in found.page_table[:, 0].tolist()] == rids
            left += len(ends)
        # So few rows that not every rank would have one are not dealt out.
        assert left == rows.sum() * (size if rows.sum() < size else 1)


def test_short_prompts_are_left_to_sglang(monkeypatch):
    """Each rank decides by its own rows."""
    config = replace(CONFIG, min_context=699)
    batch = Batch([700], [2], "cpu", monkeypatch, config=config)
    ranks = Ranks(batch, 2, monkeypatch)
    assert ranks.select(0, original=lambda *_: "result") == "result"
    assert ranks.select(1).shape[1] == TOPK
    assert batch.counts.counts == {"misa": 1, "all_heads": 0, "dsa": 1}
