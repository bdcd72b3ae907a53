"""The passes of speculative decoding: several rows a sequence, with the metadata that SGLang's own backend makes of them."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from checks import check_record

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.environ import envs
from sglang.srt.layers.attention import dsa_backend
from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend
from sglang.srt.layers.misa import hooks, indexer, operations, reference
from sglang.srt.layers.misa.batch import decode_batch
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.evaluation import hooks as evaluation
from sglang.srt.layers.misa.evaluation.capture import load_records
from sglang.srt.layers.misa.evaluation.selections import EvaluationIndexer
from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE
from sglang.srt.layers.misa.pooled_keys import PooledKeys
from sglang.srt.layers.misa.testing.batches import write_pages
from sglang.srt.layers.misa.testing.inputs import make_inputs
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

HEADS, TOPK, LAYER = 32, 128, 0
# Tokens before the pass. Drafts of the second sequence complete a page.
SEQ_LENS = [300, 62, 700, 1]
# A CUDA graph of more sequences: the others are padding.
GRAPH_SEQUENCES, CONTEXT = 6, 1024
PASSES = {
    "verify": ForwardMode.TARGET_VERIFY,
    "draft extend": ForwardMode.DRAFT_EXTEND_V2,
    "draft decode": ForwardMode.DECODE,
}
SAMPLED = MisaConfig("sampled", 3)
POOLED = MisaConfig("pooled", 3, 128)
CONFIGS = {
    "sampled": SAMPLED,
    # In decode, lengths are not known to the host: it does not apply.
    "min-context": replace(SAMPLED, min_context=500),
    "hierarchical": replace(SAMPLED, rerank_candidates=320),
    "all heads": replace(SAMPLED, active_heads=HEADS),
    "pooled": POOLED,
    "pooled, hierarchical": replace(POOLED, rerank_candidates=320),
}


@pytest.fixture(autouse=True)
def positions():
    """Where SGLang would have slots, as on a GPU by default, these are a test's own affair."""
    with envs.SGLANG_DSA_FUSE_TOPK.override(False):
        yield


def most_rows(device):
    """Draft tokens that there are kernels for."""
    if device == "cpu":
        return 8
    return operations.operations(torch.device(device)).MAX_ROWS


class Pass:
    """One pass of a server over sequences of `SEQ_LENS` tokens, whose keys are in a pool.

    Every sequence has `rows` queries: the first tokens behind the `SEQ_LENS`, or, in draft decode, the last of those.
    """

    def __init__(self, name, draft_tokens, device, monkeypatch, config, forced=(0, 0)):
        self.mode, self.device, self.config = PASSES[name], device, config
        self.draft_tokens = draft_tokens
        self.rows = 1 if self.mode.is_decode() else draft_tokens
        new = 0 if self.mode.is_decode() else draft_tokens
        self.sequences = [
            make_inputs("random", self.rows, HEADS, length + new, seed)
            for seed, length in enumerate(SEQ_LENS)
        ]
        self.forced = dict(zip(("init_tokens", "local_tokens"), forced))
        self.indexer = SimpleNamespace(
            index_topk=TOPK, num_init_tokens=forced[0], num_local_tokens=forced[1]
        )
        self.fill_pool(monkeypatch)
        self.make_backend(monkeypatch)
        for module in (hooks, evaluation):
            monkeypatch.setattr(module, "active_config", lambda: config)

    def fill_pool(self, monkeypatch):
        """Pages in any order; request 0 is SGLang's for padding, and what is in page 0 is nobody's."""
        counts = [-(-len(inputs.k) // PAGE_SIZE) for inputs in self.sequences]
        index_k = torch.randint(120, (1 + sum(counts), PAGE_SIZE * 132)).byte()
        self.req_to_token = torch.zeros(8, CONTEXT, dtype=torch.int32)
        self.requests = torch.tensor([3, 1, 7, 4])
        order = 1 + torch.randperm(sum(counts))
        for request, inputs, pages in zip(
            self.requests, self.sequences, order.split(counts)
        ):
            write_pages(index_k, pages, inputs.k, inputs.k_scale)
            slots = pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)
            self.req_to_token[request, : slots.numel()] = slots.flatten().int()
        index_k = index_k.to(self.device)
        pool = SimpleNamespace(
            start_layer=0, get_index_k_with_scale_buffer=lambda layer_id: index_k
        )
        if self.config.pools_keys:
            pool.misa_pooled_keys = PooledKeys([index_k])
            slots = torch.arange(len(index_k) * PAGE_SIZE, device=self.device)
            pool.misa_pooled_keys.update(LAYER, index_k, slots)
        for module in (hooks, evaluation):
            monkeypatch.setattr(module, "get_token_to_kv_pool", lambda: pool)

    def make_backend(self, monkeypatch):
        """SGLang's backend, without the model runner that it is made of."""
        self.backend = object.__new__(dsa_backend.DeepseekSparseAttnBackend)
        req_to_token = self.req_to_token.to(self.device)
        vars(self.backend).update(
            device=self.device,
            real_page_size=PAGE_SIZE,
            physical_page_size=PAGE_SIZE,
            dsa_index_topk=TOPK,
            dsa_index_kpool=1,
            dcp_size=1,
            _kv_shard_pool=None,
            _memory_saver_adapter=TorchMemorySaverAdapter.create(enable=False),
            _is_in_breakable_cuda_graph=lambda: False,
            _is_in_tc_piecewise_cuda_graph=lambda: False,
            _get_device_sm=lambda: 90,
            _is_blackwell=lambda: False,
            speculative_num_draft_tokens=self.draft_tokens,
            req_to_token=req_to_token,
            req_to_token_pool=SimpleNamespace(req_to_token=req_to_token),
            hisparse_coordinator=None,
            use_mha=False,
            dsa_prefill_impl="flashmla_sparse",
            dsa_decode_impl="flashmla_sparse",
            enable_auto_select_prefill_impl=False,
            dsa_kv_cache_store_fp8=False,
            use_fused_topk=True,
            dsa_topk_backend=DSATopKBackend.TORCH,
            _arange_buf=torch.arange(64, dtype=torch.int32, device=self.device),
        )
        # It asks for the ranks of a server.
        monkeypatch.setattr(dsa_backend, "pad_dsa_cache_seqlens", lambda _, x: x)

    @property
    def seq_lens(self):
        """The lengths that SGLang plans the pass with: draft extend counts what it is going to write, verify does not."""
        new = self.draft_tokens if self.mode.is_draft_extend_v2() else 0
        return torch.tensor(SEQ_LENS, device=self.device) + new

    def metadata(self, graph):
        """The metadata of an eager pass, or of a replay of a CUDA graph."""
        requests = self.requests.to(self.device)
        if graph:
            self.replay(requests.flip(0), self.seq_lens.flip(0))
            self.replay(requests, self.seq_lens)
        else:
            rows, count = self.rows, len(SEQ_LENS)
            self.backend.init_forward_metadata(
                SimpleNamespace(
                    forward_mode=self.mode,
                    batch_size=count,
                    req_pool_indices=requests,
                    seq_lens=self.seq_lens,
                    seq_lens_cpu=None if self.rows > 1 else self.seq_lens.cpu(),
                    seq_lens_sum=None,
                    extend_num_tokens=count * rows,
                    extend_seq_lens=torch.full_like(self.seq_lens, rows).int(),
                    extend_seq_lens_cpu=[rows] * count,
                    extend_prefix_lens_cpu=SEQ_LENS,
                )
            )
        return self.backend.get_indexer_metadata(
            LAYER, SimpleNamespace(forward_mode=self.mode)
        )

    def replay(self, requests, seq_lens):
        """What SGLang does before it replays a graph; the first time, it captures one first."""
        padding = GRAPH_SEQUENCES - len(requests)
        ones = torch.ones(GRAPH_SEQUENCES, dtype=torch.int64, device=self.device)
        apply = functools.partial(
            self.backend._apply_cuda_graph_metadata,
            bs=GRAPH_SEQUENCES,
            seq_lens_cpu=None,
            forward_mode=self.mode,
            spec_info=None,
        )
        if not hasattr(self.backend, "decode_cuda_graph_metadata"):
            self.backend.init_cuda_graph_state(
                GRAPH_SEQUENCES, GRAPH_SEQUENCES * self.rows
            )
            apply(req_pool_indices=ones * 0, seq_lens=ones)
        apply(
            req_pool_indices=torch.cat([requests, ones[:padding] * 0]),
            seq_lens=torch.cat([seq_lens, ones[:padding]]),
        )

    def call(self, metadata, padding=0, original=None, rids=None):
        """What the hook returns for the pass, with some padding rows behind its own."""
        rest = {"q": (HEADS, 128), "weights": (HEADS,)}
        stacked = {
            name: torch.cat(
                [getattr(x, name).float() for x in self.sequences]
                + [torch.ones(padding, *shape)]
            ).to(self.device)
            for name, shape in rest.items()
        }
        return hooks.select_paged(
            original,
            self.indexer,
            SimpleNamespace(rids=rids, spec_info=None),
            LAYER,
            stacked["q"].to(torch.float8_e4m3fn),
            stacked["weights"][:, :, None],
            metadata,
        )

    def expected(self):
        """The reference's positions."""
        options, define = dict(active_heads=3, **self.forced), reference.misa_shared
        if self.config.active_heads == HEADS:
            options, define = self.forced, reference.dsa
        else:
            options["rerank_candidates"] = self.config.rerank_candidates
            if self.config.pools_keys:
                options["block_size"], define = 128, reference.misa
        return torch.cat([define(*s, TOPK, **options) for s in self.sequences])


FORCED = pytest.mark.parametrize("forced", [(0, 0), (4, 70)])
GRAPH = pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])


@pytest.mark.parametrize(
    "name, draft_tokens",
    [("verify", 2), ("verify", 4), ("verify", 6), ("draft extend", 4)]
    + [("draft decode", 4)],
)
@pytest.mark.parametrize("variant", CONFIGS)
@GRAPH
@FORCED
def test_selects_as_defined(
    forced, graph, variant, name, draft_tokens, device, monkeypatch, tmp_path
):
    config = CONFIGS[variant]
    if name == "draft decode":
        config = replace(config, decode="misa")
    draft_tokens = min(draft_tokens, most_rows(device))
    run = Pass(name, draft_tokens, device, monkeypatch, config, forced)
    metadata = run.metadata(graph)
    padding = (GRAPH_SEQUENCES - len(SEQ_LENS)) * run.rows if graph else 3
    out = run.call(metadata, padding)
    rows = len(SEQ_LENS) * run.rows
    assert out.dtype == torch.int32 and out.shape == (rows + padding, TOPK)
    if device == "cpu":
        assert torch.equal(out[:rows].long(), run.expected())
    # A graph's padding sees the first tokens of page 0, or none.
    seen = metadata.get_seqlens_expanded()[rows:].tolist() or [0] * padding
    for row, length in zip(out[rows:].tolist(), seen):
        assert row == [*range(length), *[-1] * (TOPK - length)]
    if graph:
        return
    # Recorded, it is the same, and every request's record has its own keys.
    recording = evaluation.Recording(tmp_path)
    around = functools.partial(recording.select, hooks.select)
    monkeypatch.setattr(hooks, "select", around)
    assert torch.equal(run.call(metadata, padding, rids=list("abcd")), out)
    records = load_records(tmp_path)
    assert [record["rid"] for record in records] == list("abcd")
    for record, inputs in zip(records, run.sequences):
        assert torch.equal(record["lengths"], inputs.lengths)
        assert torch.equal(record["k"].float(), inputs.k.float())
        exact = device == "cpu"
        check_record(record, config, TOPK, exact=exact, **run.forced)
    positions = torch.cat([record["positions"] for record in records])
    assert torch.equal(positions, out[:rows].cpu())


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("variant", ["sampled", "all heads", "pooled, hierarchical"])
@GRAPH
def test_a_kernel_reads_a_sequence_once(variant, name, graph, monkeypatch):
    """Whatever a pass has of a sequence for each row, the operations get once."""
    given = []

    class Spy:
        def __getattr__(self, name):
            def call(**arguments):
                if "rows_per_seq" in arguments:
                    shape = len(arguments["page_table"]), arguments["rows_per_seq"]
                    given.append(shape)
                return getattr(operations.operations(torch.device("cpu")), name)(
                    **arguments
                )

            return call

    monkeypatch.setattr(indexer, "operations", lambda device: Spy())
    config = replace(CONFIGS[variant], decode="misa")
    run = Pass(name, 4, "cpu", monkeypatch, config)
    sequences = GRAPH_SEQUENCES if graph else len(SEQ_LENS)
    padding = (sequences - len(SEQ_LENS)) * run.rows
    run.call(run.metadata(graph), padding)
    assert given == [(sequences, run.rows)]


@pytest.mark.parametrize("name", PASSES)
@GRAPH
def test_one_row_a_sequence_is_left_to_sglang_by_default(name, graph, monkeypatch):
    assert SAMPLED.decode == "dsa"
    run = Pass(name, 3, "cpu", monkeypatch, SAMPLED)
    padding = (GRAPH_SEQUENCES - len(SEQ_LENS)) * run.rows if graph else 0
    out = run.call(run.metadata(graph), padding, original=lambda *_: "left")
    assert (out == "left") if name == "draft decode" else (out.shape[1] == TOPK)


@pytest.mark.parametrize("name", ["verify", "draft extend"])
@GRAPH
def test_fused_output_is_slots(name, graph, device, monkeypatch):
    run = Pass(name, 3, device, monkeypatch, SAMPLED)
    metadata = run.metadata(graph)
    padding = (GRAPH_SEQUENCES - len(SEQ_LENS)) * run.rows if graph else 0
    chosen = run.call(metadata, padding)[: 4 * run.rows].long().cpu()
    with envs.SGLANG_DSA_FUSE_TOPK.override(True):
        slots = run.call(metadata, padding)[: 4 * run.rows].long().cpu()
    requests = run.requests.repeat_interleave(run.rows)
    expected = run.req_to_token[requests[:, None], chosen.clamp(min=0)].long()
    assert torch.equal(slots, expected.masked_fill(chosen < 0, -1))


@pytest.mark.parametrize("draft_tokens", [2, 5])
def test_evaluation_reads_the_right_pages(draft_tokens, monkeypatch):
    """What MISA is measured against, in an eager verify."""
    run = Pass("verify", draft_tokens, "cpu", monkeypatch, SAMPLED)
    metadata = run.metadata(graph=False)
    call = hooks.Call(
        run.indexer,
        None,
        LAYER,
        torch.cat([x.q.float() for x in run.sequences]).to(torch.float8_e4m3fn),
        torch.cat([x.weights for x in run.sequences])[:, :, None],
        metadata,
    )
    batch = decode_batch(metadata)
    tensors = call.tensors(len(batch.lengths))
    other = EvaluationIndexer("hisa", 3, TOPK, {}, LAYER)
    chosen = other.select(**tensors, batch=batch).indices.long()
    expected = [reference.hisa(*inputs, TOPK) for inputs in run.sequences]
    assert torch.equal(chosen, torch.cat(expected))


def test_sglangs_own_verify_is_recorded(monkeypatch, tmp_path):
    run = Pass("verify", 3, "cpu", monkeypatch, SAMPLED)
    metadata, recording = run.metadata(graph=False), evaluation.Recording(tmp_path)
    for module in (hooks, evaluation):
        monkeypatch.setattr(module, "active_config", lambda: None)
    chosen = torch.randint(100, (12, TOPK), dtype=torch.int32)
    q = torch.cat([x.q.float() for x in run.sequences]).to(torch.float8_e4m3fn)
    weights = torch.cat([x.weights for x in run.sequences])[:, :, None]
    draft = SimpleNamespace(is_draft_input=lambda: True)
    for spec_info in (None, draft):
        batch = SimpleNamespace(rids=list("abcd"), spec_info=spec_info)
        recording.after_paged(chosen, None, batch, LAYER, q, weights, metadata)
    records = load_records(tmp_path)
    assert [record["draft"] for record in records] == [False] * 4 + [True] * 4
    for record, inputs in zip(records, run.sequences * 2):
        assert record["router"] is None
        assert torch.equal(record["k"].float(), inputs.k.float())
    positions = torch.cat([record["positions"] for record in records])
    assert torch.equal(positions, torch.cat([chosen, chosen]))
