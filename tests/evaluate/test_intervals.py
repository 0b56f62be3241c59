"""Intervals against the roots of the score equation, exact coverage and the normal
approximation."""

import math

import numpy as np
import pytest

from panacea_jax.evaluate.intervals import Z95, bootstrap_mean, wilson


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (50, 1000), (872, 872), (1, 1)])
def test_wilson_ends_solve_the_score_equation(k: int, n: int) -> None:
    """By definition (p̂ − p)² = z² p(1 − p)/n holds at both ends."""
    roots = np.roots([1 + Z95**2 / n, -(2 * k / n + Z95**2 / n), (k / n) ** 2])
    np.testing.assert_allclose(wilson(k, n), sorted(roots.real), atol=1e-9)


def test_wilson_published_example() -> None:
    """R: prop.test(x=15, n=20, correct=FALSE) gives 0.5313, 0.8881."""
    low, high = wilson(15, 20)
    assert (round(low, 4), round(high, 4)) == (0.5313, 0.8881)


def test_wilson_touches_the_ends_exactly() -> None:
    for n in range(1, 200):
        assert wilson(0, n)[0] == 0.0
        assert wilson(n, n)[1] == 1.0


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
def test_wilson_covers(p: float) -> None:
    """Exact coverage at n = 200, summed over the binomial distribution, lies within 93 % and 97
    %."""
    n = 200
    held = [k for k in range(n + 1) if wilson(k, n)[0] <= p <= wilson(k, n)[1]]
    coverage = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in held)
    assert 0.93 <= coverage <= 0.97


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="not a proportion"):
        wilson(k, n)


def test_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    values = np.random.default_rng(5).normal(3.0, 2.0, 400)
    low, high = bootstrap_mean(values, seed=1)
    assert (low, high) == bootstrap_mean(values, seed=1)
    assert (low, high) != bootstrap_mean(values, seed=2)
    half = Z95 * values.std() / 20
    np.testing.assert_allclose(
        [low, high], [values.mean() - half, values.mean() + half], atol=0.25 * half
    )


def test_bootstrap_of_equal_values_is_that_value() -> None:
    assert bootstrap_mean([2.5] * 7) == (2.5, 2.5)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_bootstrap_refuses(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(values)
