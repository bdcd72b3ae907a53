"""Heat maps of a needle-in-a-haystack result: python benchmark/quality/plot_niah.py niah.json niah.png

There is a row for each variant that was asked at as many lengths as --lengths says.
"""

import argparse
import itertools
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from results import Variant, read

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def title(variant, needles, alike) -> str:
    numbers = zip("hBm", variant[1:])
    shown = [f"{letter} = {n}" for letter, n in numbers if n]
    name = variant.variant + f" ({variant.router})" * bool(variant.router)
    return f"{', '.join([name, *shown])}: {needles} needle{'s' * (needles > 1)}{', alike' * alike}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--lengths", type=int, default=1, help="at least")
    args = parser.parse_args()
    results = [r for r in read([args.result]) if r["metric"] == "niah"]
    lengths = defaultdict(set)
    for r in results:
        lengths[Variant.of(r)].add(r["context"])
    maps = {}
    for r in results:
        if len(lengths[Variant.of(r)]) < args.lengths:
            continue
        variant, cell = Variant.of(r), (r["depth"], r["context"])
        kind = r["needles"], r.get("alike", False)
        maps.setdefault((variant, kind), {})[cell] = r["value"]
    variants, needles = (sorted(set(values)) for values in zip(*maps))
    # The same cells in all of them: white is what was not measured.
    depths, contexts = (sorted({r[n] for r in results}) for n in ("depth", "context"))
    figure, axes = plt.subplots(
        *(len(variants), len(needles)),
        figsize=(6 * len(needles), 2.4 * len(variants)),
        squeeze=False,
        layout="constrained",
    )
    for axis, key in zip(axes.flat, itertools.product(variants, needles)):
        cells = maps.get(key, {})
        shares = [[cells.get((d, c), np.nan) for c in contexts] for d in depths]
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(contexts)), [f"{c / 1024:g}K" for c in contexts])
        axis.set_yticks(range(len(depths)), [f"{d}%" for d in depths])
        axis.set(title=title(key[0], *key[1]), xlabel="context, tokens", ylabel="depth")
        figure.colorbar(image, ax=axis, label="found")
    figure.savefig(args.image, dpi=80)


if __name__ == "__main__":
    main()
