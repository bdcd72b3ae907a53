"""Heat maps of a needle-in-a-haystack result: python benchmark/quality/plot_niah.py niah.json niah.png"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def title(key) -> str:
    variant, heads, block, candidates, needles = key
    numbers = [f"h = {heads}, B = {block}"] if heads else []
    numbers += [f"m = {candidates}"] if candidates else []
    return f"{', '.join([variant, *numbers])}: {needles} needle{'s' * (needles > 1)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("image", type=Path)
    args = parser.parse_args()
    results = json.loads(args.result.read_text())
    names = ("variant", "active_heads", "block_size", "rerank_candidates", "needles")
    maps = {}
    for r in results:
        cell = (r["depth"], r["context"])
        maps.setdefault(tuple(r[n] for n in names), {})[cell] = r["value"]
    figure, axes = plt.subplots(
        len(maps), 1, figsize=(7, 3 * len(maps)), squeeze=False, layout="constrained"
    )
    for axis, (key, cells) in zip(axes[:, 0], sorted(maps.items())):
        depths, contexts = (sorted(set(values)) for values in zip(*cells))
        shares = [[cells.get((d, c), np.nan) for c in contexts] for d in depths]
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(contexts)), [f"{c / 1024:g}K" for c in contexts])
        axis.set_yticks(range(len(depths)), [f"{d}%" for d in depths])
        axis.set(title=title(key), xlabel="context, tokens", ylabel="depth")
        figure.colorbar(image, ax=axis, label="found")
    figure.savefig(args.image, dpi=120)


if __name__ == "__main__":
    main()
