"""Rank correlations of figures that every layer has one of, with p-values that hold for a handful of layers."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

Figure = Sequence[float | int] | Float[np.ndarray, " L"]

# Up to so many layers every order is looked at: 8! = 40 320.
EXACT = 8
# How far two orders of one correlation may be apart by rounding.
_SAME = 1e-9


def rank_correlation(x: Figure, y: Figure) -> dict[str, Any]:
    """Spearman's ρ and Kendall's τ-b of two figures of the same layers, each with a two-sided p-value.

    Up to ``EXACT`` layers p is the share of all orders of ``y`` that correlate with ``x`` at least as strongly, with ties or without.
    Beyond, it is scipy's: Student's t for ρ; for τ exact without ties and short of 34 layers, else normal.

    Returns:
        "layers", "spearman", "spearman_p", "kendall", "kendall_p"; all but the first None where a figure is the same in every layer, or
        where there is one layer or none.
    """
    from scipy import stats  # slow to import

    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    count = len(first)
    if count < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return {"layers": count, **dict.fromkeys(("spearman", "spearman_p", "kendall", "kendall_p"))}  # fmt: skip
    rho, tau = stats.spearmanr(first, second), stats.kendalltau(first, second)
    found = {"layers": count, "spearman": float(rho.statistic), "spearman_p": float(rho.pvalue),
             "kendall": float(tau.statistic), "kendall_p": float(tau.pvalue)}  # fmt: skip
    if count <= EXACT:
        ranks = stats.rankdata(first), stats.rankdata(second)
        found["spearman_p"], found["kendall_p"] = _exact_p(*ranks)
    return found


def pairwise(figures: Mapping[str, Figure]) -> list[dict[str, Any]]:
    """:func:`rank_correlation` of every two of the figures, "a" and "b" being their names."""
    return [
        {"a": a, "b": b, **rank_correlation(figures[a], figures[b])}
        for a, b in itertools.combinations(figures, 2)
    ]


@functools.lru_cache(maxsize=EXACT)
def _orders(count: int) -> Int[np.ndarray, "N L"]:
    """Every order of so many layers, the given one first."""
    return np.array(list(itertools.permutations(range(count))))


def _exact_p(x: Float[np.ndarray, " L"], y: Float[np.ndarray, " L"]) -> tuple[float, float]:
    """p of ρ and of τ-b from their ranks, over all orders. What both are divided by is the same for all of them."""
    orders = _orders(len(x))
    i, j = np.triu_indices(len(x), 1)
    rho = (y - y.mean())[orders] @ (x - x.mean())
    tau = np.sign(y[orders[:, i]] - y[orders[:, j]]) @ np.sign(x[i] - x[j])
    total = math.factorial(len(x))
    return tuple(float((abs(s) >= abs(s[0]) - _SAME).sum() / total) for s in (rho, tau))  # type: ignore[return-value]
