"""What a look at a few harmful batches says of each layer: every figure over the batches, and how the figures rank the layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from panacea_jax.analysis.layer_comparison import layers_in_words, mean_and_std, relative_depth
from panacea_jax.analysis.layers import Coefficients
from panacea_jax.analysis.rank_correlation import pairwise
from panacea_jax.errors import InputError

TITLES = {
    "share": "share of ‖ε‖²",
    "density": "density of ε",
    "effective": "effective change by ε",
    "importance": "importance (T-Vaccine)",
    "change": "change of hidden states",
    "share_in_training": "share of ‖ε‖², in training",
    "effective_in_training": "effective change, in training",
}
"""Every figure that a probe may hold, as its picture calls it."""


def probed(
    figures: Mapping[str, Float[np.ndarray, "N L"]],
    numbers: Sequence[int],
    trained: Sequence[Coefficients] = (),
) -> dict[str, Any]:
    """Figures of the layers, and the rank correlations of every two of them.

    Args:
        figures: by name, of N batches and L layers.
        numbers: of the layers.
        trained: coefficients of the ε that the model's own training left, which join the figures: the last ε as "last", the running
            mean as "mean".

    Returns:
        ``{"figures": [{"layer", "depth", "share": {"last", "mean", "std"}, …}, …], "correlations": [{"a", "b", "layers", "spearman", …},
        …]}``; std is over batches (n − 1), None for one batch. Correlated are the means. "density" has the order of "share" and is left
        out there.

    Raises:
        InputError: ``trained`` is of other layers.
    """
    rows: list[dict[str, Any]] = [{"layer": l} for l in numbers]
    for c in trained:
        if (theirs := layers_in_words(c["layers"])) != (ours := layers_in_words(rows)):
            raise InputError(f"layers: fine-tuning's ε has {theirs}, the probed model {ours}")
    rows = [row | {"depth": depth} for row, depth in zip(rows, relative_depth(rows))]
    for name, values in figures.items():
        for l, row in enumerate(rows):
            row[name] = {"last": float(values[-1, l]), **mean_and_std(values[:, l])}
    for figure in ("share", "effective"):
        known = [c for c in trained if c["layers"][0][figure] is not None]
        for l, row in enumerate(rows if known else ()):
            by_kind = {c["epsilon"]: c["layers"][l][figure] for c in known}
            row[f"{figure}_in_training"] = {"last": None, "mean": None, **by_kind, "std": None}
    return {"figures": rows, "correlations": pairwise(_means(rows))}


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    names = [n for n in TITLES if n in rows[0] and n != "density" and rows[0][n]["mean"] is not None]
    return {name: [row[name]["mean"] for row in rows] for name in names}
