"""SGLang 0.5.17's own indexer, called through its own functions: what `Indexer._get_topk_ragged` (prefill) and
`Indexer._get_topk_paged` (decode, verify) do between the quantized query and the indices.

Computed once a step in SGLang, so outside of what is timed: DeepGEMM's schedule, the expanded page table and lengths,
and the plan of the top-k (`DSAMetadata`). Prefill also gathers the keys of the batch from the cache in every layer;
that is timed as `gather` and not counted.
"""

from types import SimpleNamespace

import torch

from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE
from sglang.srt.layers.misa.testing.batches import Batch

from .data import Step, contiguous_keys

LOGITS_FREE_MEMORY = 0.2  # SGLANG_DSA_MQA_LOGITS_FREE_MEM_FRACTION
LOGITS_TOTAL_MEMORY = 0.3  # Indexer._MQA_LOGITS_TOTAL_MEM_FRACTION


class Prefill:
    """`fp8_mqa_logits` on contiguous keys, then `fast_topk_transform_ragged_fused`."""

    name = "dsa"
    path = "fp8_mqa_logits + fast_topk_transform_ragged_fused"

    def __init__(self, step: Step, layers: list[Batch], topk: int):
        import deep_gemm

        from sglang.srt.layers.attention.dsa.dsa_topk_backend import (
            DSATopKBackend,
            TopkTransformMethod,
        )

        self.step, self.layers, self.topk = step, layers, topk
        self.keys = [contiguous_keys(layer) for layer in layers]
        self.deep_gemm = deep_gemm
        self.backend = DSATopKBackend.SGL_KERNEL
        self.method = TopkTransformMethod
        self.row_ends = step.offsets + step.lengths
        self.rows_at_once = self._rows_at_once()
        self.contexts = torch.tensor(step.case.contexts, device=step.lengths.device)
        position = torch.arange(step.case.context, device=step.lengths.device)
        slots = step.page_table[:, position // PAGE_SIZE] * PAGE_SIZE
        self.metadata = SimpleNamespace(
            page_table_1=(slots + position % PAGE_SIZE).int()
        )

    def _rows_at_once(self) -> int:
        """Rows whose logits fit SGLang's budget for them, all if possible (without the server's own memory limit)."""
        free, total = torch.cuda.mem_get_info()
        budget = min(free * LOGITS_FREE_MEMORY, total * LOGITS_TOTAL_MEMORY)
        row_bytes = 4 * sum(self.step.case.contexts)
        return max(1, min(self.step.case.rows, int(budget // row_bytes)))

    def logits(self, i: int, rows: slice = slice(None)) -> torch.Tensor:
        """float32 [rows, S]; what a row does not see is left uninitialized."""
        layer = self.layers[i]
        return self.deep_gemm.fp8_mqa_logits(
            layer.q[rows],
            self.keys[i],
            layer.weights[rows],
            self.step.offsets[rows],
            self.row_ends[rows],
            clean_logits=False,
        )

    def select(self, logits: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        return self.backend.topk_transform(
            logits=logits,
            lengths=self.step.lengths[rows],
            topk=self.topk,
            topk_transform_method=self.method.RAGGED,
            attn_metadata=self.metadata,
            topk_indices_offset=self.step.offsets[rows],
            row_starts=self.step.offsets[rows],
        )

    def select_paged(self, logits: torch.Tensor) -> torch.Tensor:
        """The same selection written as cache slots: what a server with a BF16 KV cache asks for."""
        return self.backend.topk_transform(
            logits=logits,
            lengths=self.step.lengths,
            topk=self.topk,
            topk_transform_method=self.method.PAGED,
            attn_metadata=self.metadata,
            cu_seqlens_q_topk=self.step.cu_rows,
            row_starts=self.step.offsets,
        )

    def total(self, i: int) -> torch.Tensor:
        """The indices of layer i -> int32 [T, topk]."""
        if self.rows_at_once >= self.step.case.rows:
            return self.select(self.logits(i))
        chunks = []
        for first in range(0, self.step.case.rows, self.rows_at_once):
            rows = slice(first, first + self.rows_at_once)
            chunks.append(self.select(self.logits(i, rows), rows))
        return torch.cat(chunks)

    def gather(self, i: int):
        """SGLang's copy of the batch's keys out of the cache."""
        from sglang.kernels.ops.attention.dsa.index_buf_accessor import GetKAndS

        layer, case = self.layers[i], self.step.case
        return GetKAndS.execute(
            SimpleNamespace(page_size=PAGE_SIZE, index_head_dim=layer.q.shape[2]),
            layer.index_k,
            page_indices=self.step.page_table,
            seq_len_tensor=self.contexts,
            seq_len_sum=sum(case.contexts),
            max_seq_len=case.context,
        )

    def stages(self) -> dict:
        """Parts of `total`, each a function of the layer."""
        if self.rows_at_once < self.step.case.rows:
            return {}
        self.kept_logits = self.logits(0)
        return {"logits": self.logits, "topk": lambda i: self.select(self.kept_logits)}

    def extras(self) -> dict:
        """Timed beside `total`, not part of it; `stages` comes first."""
        extras = {"gather": self.gather}
        if self.rows_at_once >= self.step.case.rows:
            extras["topk_paged"] = lambda i: self.select_paged(self.kept_logits)
        return extras

    def positions(self, output: torch.Tensor) -> torch.Tensor:
        return self.step.positions(self.layers[0], output)


class Paged:
    """`fp8_paged_mqa_logits`, then `topk_transform_512_v2`; verify rows split into sequences of one row, or native."""

    name = "dsa"

    def __init__(self, step: Step, layers: list[Batch], topk: int):
        import deep_gemm

        from sglang.kernels.ops.attention.dsa import (
            deepgemm_paged_mqa_logits_native,
            deepgemm_paged_mqa_logits_split,
        )
        from sglang.kernels.ops.attention.dsv4.topk import plan_topk_v2
        from sglang.srt.layers.attention.dsa.dsa_topk_backend import (
            DSATopKBackend,
            TopkTransformMethod,
        )

        case = step.case
        self.step, self.layers, self.topk = step, layers, topk
        self.kept = []
        self.backend = DSATopKBackend.SGL_KERNEL
        if not self.backend.should_use_topk_v2():
            raise RuntimeError("SGLANG_OPT_USE_TOPK_V2 is off: not SGLang's default")
        self.method = TopkTransformMethod.PAGED
        self.native = case.native
        self.path = "fp8_paged_mqa_logits + topk_transform_512_v2"
        if case.rows_per_seq > 1:
            self.path += " (native)" if case.native else " (rows split)"
        self.fp8_paged_mqa_logits = deep_gemm.fp8_paged_mqa_logits
        self.logits_native = deepgemm_paged_mqa_logits_native
        self.logits_split = deepgemm_paged_mqa_logits_split

        contexts = torch.tensor(case.contexts, device=step.lengths.device).int()
        self.context_lens = (
            contexts[:, None].expand(-1, case.rows_per_seq).contiguous()
            if case.native
            else step.lengths[:, None].contiguous()
        )
        self.schedule = deep_gemm.get_paged_mqa_logits_metadata(
            self.context_lens, PAGE_SIZE, deep_gemm.get_num_sms()
        )
        page_table = step.page_table.repeat_interleave(case.rows_per_seq, dim=0)
        self.metadata = SimpleNamespace(
            real_page_table=page_table,
            page_table_1=None,
            page_size=PAGE_SIZE,
            topk_v2_plan=plan_topk_v2(step.lengths),
        )

    def logits(self, i: int) -> torch.Tensor:
        """float32 [T, P * 64]; what a row does not see is left uninitialized."""
        case, layer = self.step.case, self.layers[i]
        page_table = self.metadata.real_page_table
        arguments = (
            self.fp8_paged_mqa_logits,
            layer.q,
            layer.index_k.view(len(layer.index_k), PAGE_SIZE, 1, -1),
            layer.weights,
            self.context_lens,
            page_table,
            self.schedule,
            page_table.shape[1] * PAGE_SIZE,
        )
        if self.native:
            logits = self.logits_native(
                *arguments, q_offset=case.rows, B=case.batch, next_n=case.rows_per_seq
            )
        else:
            logits = self.logits_split(*arguments, q_offset=case.rows)
        # These kernels are launched programmatically: the logits of the next layer may be written before the top-k of
        # this one has ended. In a server other kernels lie between them; here they need memory of their own.
        self.kept.append(logits)
        return logits

    def select(self, logits: torch.Tensor) -> torch.Tensor:
        return self.backend.topk_transform(
            logits=logits,
            lengths=self.step.lengths,
            topk=self.topk,
            topk_transform_method=self.method,
            attn_metadata=self.metadata,
        )

    def total(self, i: int) -> torch.Tensor:
        """The cache slots of layer i -> int32 [T, topk]."""
        return self.select(self.logits(i))

    def stages(self) -> dict:
        logits = self.logits(0)
        return {"logits": self.logits, "topk": lambda i: self.select(logits)}

    def extras(self) -> dict:
        return {}

    def positions(self, output: torch.Tensor) -> torch.Tensor:
        return self.step.positions(self.layers[0], output)


def make(step: Step, layers: list[Batch], topk: int):
    kind = Prefill if step.case.mode == "prefill" else Paged
    return kind(step, layers, topk)
