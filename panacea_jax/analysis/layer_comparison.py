"""Layer coefficients of several runs side by side: seeds of one model together, models over relative depth."""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from panacea_jax.analysis.layers import Coefficients
from panacea_jax.analysis.rank_correlation import rank_correlation
from panacea_jax.errors import InputError

FIGURES = ("share", "density", "effective")


class LayerRun(NamedTuple):
    """One run of a comparison.

    Attributes:
        source: where its coefficients come from.
        model: what model it is a run of; runs of one model are seeds of it.
        kinds: its coefficients by the kind of their ε.
    """

    source: str
    model: str
    kinds: Mapping[str, Coefficients]


def told_apart(runs: Iterable[LayerRun]) -> list[LayerRun]:
    """The runs, those of one name which are of several models by their layers and modules named apart."""
    runs = list(runs)
    forms: dict[str, set[str]] = {}
    for run in runs:
        forms.setdefault(run.model, set()).add(_form(run))
    return [
        run._replace(model=f"{run.model}, {_form(run)}") if len(forms[run.model]) > 1 else run
        for run in runs
    ]


def _form(run: LayerRun) -> str:
    layers = next(iter(run.kinds.values()))["layers"]
    modules = " ".join(name.removesuffix("_proj") for name in layers[0]["modules"])
    return f"{layers_in_words(layers)}, {modules}"


def layers_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """"4 layers", where these are the lowest; else "layers 20–29" or "layers 2, 7"."""
    numbers = [row["layer"] for row in rows]
    first, last = numbers[0], numbers[-1]
    if numbers != list(range(first, last + 1)):
        return f"layers {', '.join(map(str, numbers))}"
    return f"layers {first}–{last}" if first else f"{len(numbers)} layers"


def common_kinds(runs: Sequence[LayerRun]) -> list[str]:
    """Kinds of ε that all runs have, in the order of the first.

    Raises:
        InputError: none.
    """
    common = [kind for kind in runs[0].kinds if all(kind in run.kinds for run in runs)]
    if not common:
        held = "; ".join(f"{run.source} holds {', '.join(run.kinds)}" for run in runs)
        raise InputError(f"layers: no kind of ε that all of them have: {held}")
    return common


def compare_runs(runs: Sequence[LayerRun], kind: str) -> dict[str, Any]:
    """One object of layers_compared.json.

    A layer's relative depth is l / (L − 1). What models are compared by is each figure over its mean over the layers, 1 in every layer
    for an ε that is spread evenly: shares of few and of many layers, and ε of unlike norms, are of one size then.

    Args:
        runs: at least one.
        kind: of the ε, such as "mean".

    Returns:
        ``{"epsilon": kind, "runs": [{"source", "model", "layers": [{"layer", "depth", "share", "density", "effective"}, …]}, …],
        "models": [{"model", "runs", "agreement", "layers": [{"layer", "depth", "share": {"mean", "std"}, …}]}, …],
        "correlations": [{"figure", "a", "b", "layers", "spearman", …}, …]}``. The figures of "models" are relative, their std is over
        runs (n − 1; None for one run), "agreement" is the mean of Spearman's ρ of the shares over pairs of its runs. "effective" is left
        out of a model whose runs do not all have it. Two models are correlated at the depths of the one with fewer layers, the other
        being read between its layers and not beyond them.

    Raises:
        InputError: runs of one model that differ in their layers.
    """
    rows = {i: run.kinds[kind]["layers"] for i, run in enumerate(runs)}
    models = {name: [i for i in rows if runs[i].model == name] for name in dict.fromkeys(run.model for run in runs)}  # fmt: skip
    for name, members in models.items():
        held = {layers_in_words(rows[i]) for i in members}
        if len(held) > 1:
            raise InputError(f"layers: runs of {' and of '.join(sorted(held))} are both called {name!r}")
    found = [_model(name, [rows[i] for i in members]) for name, members in models.items()]
    return {
        "epsilon": kind,
        "runs": [
            {
                "source": run.source,
                "model": run.model,
                "layers": [
                    {"layer": row["layer"], "depth": depth, **{f: row[f] for f in FIGURES}}
                    for row, depth in zip(rows[i], relative_depth(rows[i]))
                ],
            }
            for i, run in enumerate(runs)
        ],
        "models": found,
        "correlations": [
            {"figure": figure, "a": a["model"], "b": b["model"], **rank_correlation(*_at_one_depth(a, b, figure))}
            for a, b in itertools.combinations(found, 2)
            for figure in ("share", "effective")  # in one model density has the order of share
            if all(figure in model["layers"][0] for model in (a, b))
        ],
    }  # fmt: skip


def relative_depth(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """l / (L − 1) of each row; 0 for a model of one layer."""
    last = max(rows[-1]["layer"], 1)
    return [row["layer"] / last for row in rows]


def relative_figure(rows: Sequence[Mapping[str, Any]], figure: str) -> Float[np.ndarray, " L"]:
    """A figure over its mean over the layers; all 0 where that is 0."""
    values = np.array([row[figure] for row in rows], np.float64)
    mean = values.mean()
    return values / mean if mean > 0 else values


def _model(name: str, runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """A model's figures over its runs."""
    known = [f for f in FIGURES if all(row[f] is not None for rows in runs for row in rows)]
    by_figure = {f: np.stack([relative_figure(rows, f) for rows in runs]) for f in known}
    pairs = [rank_correlation(a, b)["spearman"] for a, b in itertools.combinations(by_figure["share"], 2)]  # fmt: skip
    defined = [rho for rho in pairs if rho is not None]
    layers = [
        {"layer": row["layer"], "depth": depth, **{f: mean_and_std(v[:, l]) for f, v in by_figure.items()}}
        for l, (row, depth) in enumerate(zip(runs[0], relative_depth(runs[0])))
    ]  # fmt: skip
    return {"model": name, "runs": len(runs), "agreement": statistics.fmean(defined) if defined else None,
            "layers": layers}  # fmt: skip


def mean_and_std(values: Float[np.ndarray, " N"]) -> dict[str, float | None]:
    """Mean and standard deviation (n − 1) of a sample; None for what one value does not have."""
    std = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "std": std}


def _at_one_depth(
    a: Mapping[str, Any], b: Mapping[str, Any], figure: str
) -> list[Float[np.ndarray, " L"]]:
    """A figure of two models at the depths of the one with fewer layers, where the other has layers on both sides."""
    depths = [[row["depth"] for row in model["layers"]] for model in (a, b)]
    values = [[row[figure]["mean"] for row in model["layers"]] for model in (a, b)]
    low, high = max(d[0] for d in depths), min(d[-1] for d in depths)
    at = [depth for depth in min(depths, key=len) if low <= depth <= high]
    return [np.interp(at, depth, value) for depth, value in zip(depths, values)]
