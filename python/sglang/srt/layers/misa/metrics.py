"""Prometheus metrics of MISA, exported with SGLang's own by --enable-metrics."""

from typing import Dict

from sglang.srt.layers.misa.config import MisaConfig


def export(config: MisaConfig, pooled_keys_bytes: int, labels: Dict[str, str]) -> None:
    """Set the gauges that describe a scheduler's MISA, with the labels of the scheduler's other metrics."""
    # As in SGLang: importable only once PROMETHEUS_MULTIPROC_DIR is set.
    from prometheus_client import Gauge

    for name, documentation, value in (
        (
            "active_heads",
            "The number of indexer heads that score the tokens of a query.",
            config.active_heads,
        ),
        (
            "block_size",
            "The number of tokens in a pooled block.",
            config.block_size,
        ),
        (
            "rerank_candidates",
            "The number of tokens that are scored again with all heads.",
            config.rerank_candidates,
        ),
        ("pooled_keys_bytes", "The size of the pooled keys.", pooled_keys_bytes),
    ):
        Gauge(
            name=f"sglang:misa_{name}",
            documentation=documentation,
            labelnames=labels.keys(),
            multiprocess_mode="mostrecent",
        ).labels(**labels).set(value)
