"""Taking a direction off a span, against NumPy's least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.perturbation import off_span
from tests.perturbation.test_ball import flat, tree


@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_is_left_is_the_residual_of_least_squares(count):
    others = [tree(seed) for seed in range(1, count + 1)]
    matrix = np.stack([flat(other) for other in others], axis=1)
    expected = flat(tree()) - matrix @ np.linalg.lstsq(matrix, flat(tree()))[0]
    left = flat(off_span(tree(), others))
    np.testing.assert_allclose(left, expected, atol=2e-6)
    assert np.abs(matrix.T @ left).max() < 1e-5


def test_zeros_and_repetitions_span_nothing():
    """Also nearly equal gradients, of which the difference is rounding."""
    one, zero = tree(1), tree(scale=0.0)
    twice = jax.tree.map(lambda x: 2 * x, one)
    near = jax.tree.map(lambda x: x * jnp.float32(1 + 1e-7), one)
    left = flat(off_span(tree(), [zero, one, twice, near]))
    np.testing.assert_allclose(left, flat(off_span(tree(), [one])), atol=1e-6)
    np.testing.assert_array_equal(flat(off_span(tree(), [])), flat(tree()))


def test_of_what_lies_in_the_span_nothing_is_left():
    """Not roundings, of which a sphere would make a direction. What is not a number stays so."""
    others = [tree(1), tree(2)]
    within = jax.tree.map(lambda x, y: 3 * x - 0.7 * y, *others)
    np.testing.assert_array_equal(flat(off_span(within, others)), 0)
    near = jax.tree.map(lambda x, y: x + 1e-3 * y, within, tree())
    assert np.linalg.norm(flat(off_span(near, others))) > 1e-4 * np.linalg.norm(flat(tree()))
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), within)
    assert np.isnan(flat(off_span(broken, others))).any()
