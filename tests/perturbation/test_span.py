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
    assert np.abs(flat(off_span(one, [one]))).max() < 1e-6
