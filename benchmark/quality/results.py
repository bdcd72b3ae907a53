"""The records that all benchmarks of quality write: what they are about, read and shown."""

import json
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence


class Variant(NamedTuple):
    """What selects; 0 where it has no such number, "" where it has no router.

    `active_heads` counts slots: with the sampled router the shared head has one of them.
    """

    variant: str
    active_heads: int = 0
    block_size: int = 0
    rerank_candidates: int = 0
    taken: int = 0
    router: str = ""

    @classmethod
    def of(cls, record: Dict) -> "Variant":
        """That of a record; where it names no router it is from before there was another one than the paper's."""
        router = "pooled" if record["variant"].startswith("misa") else ""
        record = {"taken": 0, "router": router} | record
        return cls(*(record[name] for name in cls._fields))


def read(files: Iterable[Path]) -> List[Dict]:
    """The records of several files."""
    return [record for file in files for record in json.loads(file.read_text())]


def ci95(values: Sequence[float]) -> Optional[float]:
    """Half the width of Student's 95% confidence interval of a mean; None for one value.

    Prompts and windows can be as few as two, for which 1.96 standard errors would promise far too much.
    """
    if len(values) == 1:
        return None
    # Takes a second, which most of what imports this module has no need of.
    from scipy.stats import sem, t

    return float(t.ppf(0.975, len(values) - 1) * sem(values))


def show(records: List[Dict]) -> None:
    """Print a line for each record."""
    for record in records:
        record = Variant.of(record)._asdict() | record
        error = "" if record["ci95"] is None else f" +- {record['ci95']:.4f}"
        print(
            "{variant:19} {router:7} h {active_heads:2}  B {block_size:4}  m {rerank_candidates:5}  a {taken:4}  context {context:6}  "
            "{metric:16} {value:.4f}".format(**record) + error
        )
