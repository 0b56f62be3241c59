"""Pictures of layer coefficients. matplotlib is imported where it is used: it is slow to import. Without pyplot no display is touched."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from panacea_jax.analysis.layer_comparison import FIGURES, relative_depth, relative_figure
from panacea_jax.analysis.layer_probe import TITLES
from panacea_jax.analysis.layers import MODULES, Coefficients

COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme, told apart with colour-blind eyes; one per entry of MODULES."""
_SPARE = ("#999933", "#882255", "#44aa99", "#332288")
_OF_KIND = {
    "last": "ε of the last step",
    "mean": "running mean of ε over training",
    "probe_last": "probe: ε of the last batch",
    "probe_mean": "probe: mean of ε over batches",
}


def plot_coefficients(results: Sequence[Coefficients], path: Path) -> None:
    """A PNG with one panel per kind: each layer's share of ‖ε‖² as bars stacked by module, the
    density ‖ε_l‖/√n_l as a line."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(9.0, 0.6 + 3.4 * len(results)), layout="constrained")
    panels = plot.subplots(len(results), 1, squeeze=False)[:, 0]
    for axes, result in zip(panels, results):
        rows = result["layers"]
        layers = np.array([row["layer"] for row in rows])
        base = np.zeros(len(rows))
        spare = iter(_SPARE)
        for name in rows[0]["modules"]:
            shares = 100 * np.array([row["modules"][name]["share"] for row in rows])
            colour = COLOURS[MODULES.index(name)] if name in MODULES else next(spare, "#000000")
            axes.bar(
                layers,
                shares,
                bottom=base,
                width=0.8,
                color=colour,
                label=name.removesuffix("_proj"),
            )
            base += shares
        axes.set(
            title=_OF_KIND.get(result["epsilon"], result["epsilon"]),
            xlabel="layer (0 is next to the embeddings)",
            ylabel="share of ‖ε‖² (%)",
        )
        axes.set_xlim(layers.min() - 0.6, layers.max() + 0.6)
        axes.set_ylim(0, 1.1 * base.max() or 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        density = axes.twinx()
        values = [row["density"] for row in rows]
        (line,) = density.plot(
            layers, values, color="black", marker="o", markersize=3.5, linewidth=1.2
        )
        density.set_ylabel("density ‖ε_l‖ / √n_l")
        density.set_ylim(0, 1.1 * max(values) or 1)
        density.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            [*handles, line],
            [*labels, "density"],
            loc="center left",
            bbox_to_anchor=(1.1, 0.5),
            frameon=False,
        )
    plot.savefig(path, dpi=150)


def plot_comparison(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A PNG with one row per kind and one panel per figure: a colour per model over relative depth, its runs thin, their mean thick
    within a band of one standard deviation."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(12.5, 0.8 + 3.4 * len(results)), layout="constrained")
    panels = plot.subplots(len(results), len(FIGURES), squeeze=False)
    for line, result in zip(panels, results):
        for axes, figure in zip(line, FIGURES):
            for number, model in enumerate(result["models"]):
                if figure not in model["layers"][0]:
                    continue
                colour = _colour(number)
                runs = [r["layers"] for r in result["runs"] if r["model"] == model["model"]]
                for rows in runs if len(runs) > 1 else ():
                    axes.plot(relative_depth(rows), relative_figure(rows, figure), color=colour, linewidth=0.5, alpha=0.6)  # fmt: skip
                count = f" ({len(runs)} runs)" if len(runs) > 1 else ""
                _band(axes, model["layers"], figure, colour, model["model"] + count, 1.0)
            axes.axhline(1, color="#999999", linewidth=0.6, linestyle=":")
            axes.set(title=figure, xlabel="relative depth l / (L − 1)", ylabel="over its mean over the layers")  # fmt: skip
            axes.set_ylim(bottom=0)
        line[1].set_title(f"{_OF_KIND.get(result['epsilon'], result['epsilon'])}\ndensity")
        names = line[0].get_legend_handles_labels()
        line[-1].legend(*names, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
        found = [c for c in result["correlations"] if c["figure"] == "share" and c["spearman"] is not None]  # fmt: skip
        text = "\n".join(f"{c['a']} – {c['b']}: ρ {c['spearman']:.2f}, p {c['spearman_p']:.3g}" for c in found[:6])  # fmt: skip
        # Outside of all panels, where no line runs through it.
        line[-1].text(1.04, 0.0, text, transform=line[-1].transAxes, fontsize=6, va="bottom")
    plot.savefig(path, dpi=150)


def plot_probe(found: Mapping[str, Any], path: Path) -> None:
    """A PNG with every figure of a probe over the layers, and the rank correlations of every two of them."""
    from matplotlib.figure import Figure

    rows = found["figures"]
    names = [name for name in TITLES if name in rows[0]]
    plot = Figure(figsize=(13.5, 5.6), layout="constrained")
    lines, matrix = plot.subplots(1, 2, width_ratios=(1.3, 1))
    for number, name in enumerate(n for n in names if n != "density"):
        mean = float(np.mean([row[name]["mean"] or 0 for row in rows])) or 1.0
        _band(lines, rows, name, _colour(number), TITLES[name], mean, "layer")
    lines.axhline(1, color="#999999", linewidth=0.6, linestyle=":")
    lines.set(xlabel="layer (0 is next to the embeddings)", ylabel="over its mean over the layers; band: ± 1 std over batches")  # fmt: skip
    if all((row[name]["mean"] or 0) > 0 for row in rows for name in names):
        lines.set_yscale("log")  # importance is of another order in the first layer of many models
    else:
        lines.set_ylim(bottom=0)
    lines.xaxis.get_major_locator().set_params(integer=True)
    lines.legend(frameon=False, fontsize=8)
    _correlation_matrix(matrix, found["correlations"])
    plot.savefig(path, dpi=150)


def _colour(number: int) -> str:
    colours = (*COLOURS[:-1], *_SPARE)
    return colours[number % len(colours)]


def _band(
    axes: Any, rows: Sequence[Mapping[str, Any]], figure: str, colour: str, label: str, unit: float, x: str = "depth"
) -> None:  # fmt: skip
    """The means of a figure as a line, and what lies within one standard deviation of it, in the given unit."""
    mean = np.array([row[figure]["mean"] for row in rows], np.float64) / unit
    std = np.array([row[figure]["std"] or 0 for row in rows], np.float64) / unit
    where = [row[x] for row in rows]
    axes.plot(where, mean, color=colour, marker="o", markersize=2.5, linewidth=1.6, label=label)
    axes.fill_between(where, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)


def _correlation_matrix(axes: Any, correlations: Sequence[Mapping[str, Any]]) -> None:
    """Spearman's ρ above the diagonal, Kendall's τ below it, each with its p."""
    names = list(dict.fromkeys(name for found in correlations for name in (found["a"], found["b"])))
    values = np.full((len(names), len(names)), np.nan)
    for found in correlations:
        a, b = names.index(found["a"]), names.index(found["b"])
        for (row, column), kind in (((a, b), "spearman"), ((b, a), "kendall")):
            if found[kind] is None:
                continue
            values[row, column] = found[kind]
            axes.text(column, row, f"{found[kind]:.2f}\np {found[f'{kind}_p']:.2g}", ha="center", va="center", fontsize=7)  # fmt: skip
    axes.imshow(values, cmap="PuOr", vmin=-2, vmax=2)  # pale enough to be written on
    labels = [TITLES.get(name, name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=35, ha="right", fontsize=7)
    axes.set_yticks(range(len(names)), labels, fontsize=7)
    axes.set_title("Spearman (above) and Kendall (below the diagonal)", fontsize=9)
