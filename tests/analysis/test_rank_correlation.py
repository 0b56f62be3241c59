"""Rank correlations against hand-made ranks, a count over all orders in whole numbers, and scipy."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from panacea_jax.analysis.rank_correlation import EXACT, pairwise, rank_correlation

# One pair of neighbours changed places, and another.
X, Y = (0.1, 0.2, 0.3, 0.4, 5.0), (20, 10, 40, 30, 90)


def test_by_hand():
    """Σ d² = 4, so ρ = 1 − 6 · 4 / (5 · 24); 8 pairs in order and 2 that are not, so τ = 6 / 10."""
    found = rank_correlation(X, Y)
    assert found["layers"] == 5
    assert found["spearman"] == pytest.approx(0.8) and found["kendall"] == pytest.approx(0.6)


def test_p_is_counted_over_all_orders():
    """By Σ d² for ρ and by inversions for τ, in whole numbers; for τ also scipy's exact one."""
    orders = list(itertools.permutations(range(5)))
    squares = [sum((i - j) ** 2 for i, j in enumerate(order)) for order in orders]
    inversions = [sum(a > b for a, b in itertools.combinations(order, 2)) for order in orders]
    far_rho = sum(s <= 4 or s >= 40 - 4 for s in squares)
    far_tau = sum(n <= 2 or n >= 10 - 2 for n in inversions)
    found = rank_correlation(X, Y)
    assert found["spearman_p"] == pytest.approx(float(Fraction(far_rho, 120)), abs=1e-12)
    assert found["kendall_p"] == pytest.approx(float(Fraction(far_tau, 120)), abs=1e-12)
    assert found["kendall_p"] == pytest.approx(stats.kendalltau(X, Y, method="exact").pvalue)
    assert found["spearman_p"] != pytest.approx(stats.spearmanr(X, Y).pvalue, rel=0.05)  # Student's t


def test_ties():
    """Against scipy's permutation test over all pairings."""
    x, y = (1, 1, 2, 3, 3, 4), (2.0, 1.0, 1.0, 3.0, 5.0, 5.0)
    found = rank_correlation(x, y)
    for name, statistic in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
        exact = stats.permutation_test(
            (x,), lambda a, f=statistic: f(a, y).statistic, permutation_type="pairings", n_resamples=np.inf
        )  # fmt: skip
        assert found[name] == pytest.approx(exact.statistic)
        assert found[f"{name}_p"] == pytest.approx(exact.pvalue)


def test_many_layers_have_scipys_p():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, EXACT + 4))
    found = rank_correlation(x, y)
    assert found["spearman_p"] == stats.spearmanr(x, y).pvalue
    assert found["kendall_p"] == stats.kendalltau(x, y, method="exact").pvalue


def test_two_layers_say_nothing_and_a_constant_has_no_order():
    assert rank_correlation((1, 2), (5, 3)) == pytest.approx(
        {"layers": 2, "spearman": -1.0, "spearman_p": 1.0, "kendall": -1.0, "kendall_p": 1.0}
    )
    for x, y in (((1, 1, 1), (1, 2, 3)), ((4,), (2,))):
        found = rank_correlation(x, y)
        assert [v for k, v in found.items() if k != "layers"] == [None] * 4


def test_every_pair_once():
    found = pairwise({"a": X, "b": Y, "c": X[::-1]})
    assert [(f["a"], f["b"]) for f in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found[1]["spearman"] == pytest.approx(-1)
