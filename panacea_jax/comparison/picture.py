"""The picture of a comparison that varied settings: HS of every method over them, and how high it was so far."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panacea_jax.analysis.layer_pictures import COLOURS


def plot_settings(result: Mapping[str, Any], path: Path) -> None:
    """A PNG with a panel per poison ratio: the mean HS of every method under every setting with its 95 % interval, dashed the highest so
    far of those that count (``worst``). Nothing is drawn where no harmful set was answered.

    Args:
        result: content of compare.json, of a comparison with ``compare.vary``.
        path: of the picture.
    """
    from matplotlib.figure import Figure  # slow to import; without pyplot no display is touched

    # Models before fine-tuning have a setting too, where the base was varied, but no attack.
    rows = [row for row in result["rows"] if row["ratio"] is not None and "hs" in row["figures"]]
    if not rows:
        return
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    ratios = result["ratios"]
    plot = Figure(figsize=(3 + 0.5 * len(settings) + 2, 0.8 + 3.2 * len(ratios)), layout="constrained")
    for axes, ratio in zip(plot.subplots(len(ratios), 1, squeeze=False)[:, 0], ratios):
        for number, method in enumerate(result["methods"]):
            found = [r["figures"]["hs"] for r in rows if (r["method"], r["ratio"]) == (method, ratio)]
            means, lows, highs = zip(*((f["mean"], *f["ci95"]) for f in found))
            worst = next(r["hs"] for r in result["worst"] if (r["method"], r["ratio"]) == (method, ratio))
            so_far = [math.nan if value is None else value for value in worst["cumulative"]]
            where, colour = range(len(means)), COLOURS[number % len(COLOURS)]
            axes.plot(where, means, color=colour, marker="o", markersize=3.5, label=method)
            axes.vlines(where, lows, highs, color=colour, linewidth=0.8)
            axes.plot(where, so_far, color=colour, linewidth=0.8, linestyle="--")
        axes.set(title=f"poison ratio {ratio:g}", ylabel="HS (%); dashed: worst so far", ylim=(-2, 102))
        axes.set_xticks(range(len(settings)), settings, rotation=60, ha="right", fontsize=6)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7)
    plot.savefig(path, dpi=150)
