"""Prometheus metrics of MISA, exported with SGLang's own by --enable-metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict

from sglang.srt.layers.misa.audit import Counts
from sglang.srt.layers.misa.config import MisaConfig

if TYPE_CHECKING:
    from prometheus_client import Counter


class RowCounts:
    """Rows of prompts by what scored them, in all layers of this process, counted on the host.

    Attributes:
        counts: rows that MISA routed ("misa"), that all heads scored in a batch of MISA's ("all_heads"), and of batches that
            were left to SGLang's own indexer ("dsa"). What a CUDA graph replays, decode and speculative verify that is, passes
            no Python and is not counted: decode goes where --misa-decode says, and verify to MISA. Every rank of an attention
            TP group counts all rows, whoever of them selected; with context parallelism a rank counts its own, one in as many
            as there are ranks.
    """

    def __init__(self) -> None:
        self.counts = {"misa": 0, "all_heads": 0, "dsa": 0}
        self._exported: Dict[str, Counter] = {}

    def add(self, path: str, rows: int) -> None:
        self.counts[path] += rows
        if self._exported and rows:
            self._exported[path].inc(rows)

    def export(self, labels: Dict[str, str]) -> None:
        """From now on count in a Prometheus counter too."""
        from prometheus_client import Counter

        counter = Counter(
            name="sglang:misa_rows_total",
            documentation="Rows of prompts in all layers, by what scored them: the routed heads, all heads, or SGLang's own indexer.",
            labelnames=[*labels, "path"],
        )
        self._exported = {
            path: counter.labels(**labels, path=path) for path in self.counts
        }


ROWS = RowCounts()


def export(config: MisaConfig, pooled_keys_bytes: int, labels: Dict[str, str]) -> None:
    """Set the gauges that describe a scheduler's MISA, with the labels of the scheduler's other metrics, and export `ROWS`."""
    # As in SGLang: importable only once PROMETHEUS_MULTIPROC_DIR is set.
    from prometheus_client import Gauge

    def gauge(name: str, documentation: str, value: int, **more: str) -> None:
        own = {**labels, **more}
        Gauge(
            name=f"sglang:misa_{name}",
            documentation=documentation,
            labelnames=own.keys(),
            multiprocess_mode="mostrecent",
        ).labels(**own).set(value)

    gauge(
        "info",
        "1, with the router, and with what selects in decode.",
        1,
        router=config.router,
        decode=config.decode,
    )
    gauge(
        "active_heads",
        "The number of heads that score the tokens of a query.",
        config.active_heads,
    )
    if config.block_size is not None:
        gauge(
            "block_size", "The number of tokens in a pooled block.", config.block_size
        )
    gauge(
        "rerank_candidates",
        "The number of tokens that are scored again with all heads.",
        config.rerank_candidates,
    )
    gauge(
        "min_context",
        "The number of tokens from which on a prompt's tokens are routed.",
        config.min_context,
    )
    gauge("pooled_keys_bytes", "The size of the pooled keys.", pooled_keys_bytes)
    ROWS.export(labels)


class AuditMetrics:
    """What `audit` counts, by layer, with the labels of the scheduler's other metrics."""

    def __init__(self, labels: Dict[str, str]):
        from prometheus_client import Counter, Gauge

        def gauge(name: str, documentation: str) -> Gauge:
            return Gauge(
                name=f"sglang:misa_audit_{name}",
                documentation=documentation,
                labelnames=[*labels, "layer"],
                multiprocess_mode="mostrecent",
            )

        self._labels = labels
        self._recall = gauge(
            "recall",
            "The share of what all heads select that MISA selected, in the last audit.",
        )
        self._heads = gauge(
            "heads", "The heads of the layer that were routed in any audited row."
        )
        self._busiest = gauge(
            "busiest_head",
            "The share of the audited rows in which the layer's most used head was routed.",
        )
        self._rows = Counter(
            name="sglang:misa_audit_rows_total",
            documentation="Rows that all heads selected for as well.",
            labelnames=[*labels, "layer"],
        )
        self._tokens = Counter(
            name="sglang:misa_audit_tokens_total",
            documentation="Tokens that all heads select, by whether MISA selected or missed them.",
            labelnames=[*labels, "layer", "misa"],
        )

    def export(self, layer_id: int, last: Counts, total: Counts) -> None:
        """Export a layer's last audit, and the heads of all."""
        own = {**self._labels, "layer": str(layer_id)}
        self._recall.labels(**own).set(last.recall)
        self._rows.labels(**own).inc(last.rows)
        self._tokens.labels(**own, misa="selected").inc(last.selected)
        self._tokens.labels(**own, misa="missed").inc(last.tokens - last.selected)
        self._heads.labels(**own).set(sum(rows > 0 for rows in total.heads))
        self._busiest.labels(**own).set(max(total.heads) / total.rows)
