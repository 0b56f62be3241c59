"""EWC on losses whose answer is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.defences import Ewc, Sft
from panacea_jax.errors import InputError

KEY = jax.random.key(0)
START = {"x": jnp.asarray([1.0, -2.0, 0.5])}
SETS = [jnp.asarray(-0.4), jnp.asarray(0.9)]


@jax.tree_util.register_static
class Quadratic:
    """½ ‖x − t‖²."""

    def __call__(self, w, batch):
        return 0.5 * jnp.sum((w["x"] - batch) ** 2)


def prepared(defence):
    return defence.first_pass(Quadratic(), START, {"alignment": iter(SETS)}, defence.init(START))


def test_the_fisher_diagonal_sums_squared_batch_gradients():
    state = prepared(Ewc())
    x = np.asarray(START["x"])
    np.testing.assert_allclose(state.fisher["x"], (x + 0.4) ** 2 + (x - 0.9) ** 2, rtol=1e-6)
    np.testing.assert_array_equal(state.start["x"], x)


def test_the_gradient_and_the_penalty():
    state = prepared(Ewc())
    w = {"x": START["x"] + jnp.asarray([0.1, 0.2, -0.3])}
    grads, after, metrics = Ewc(lam=3.0).gradient(
        Quadratic(), w, {"user": jnp.asarray(0.2)}, state, KEY
    )
    drift, fisher = np.asarray(w["x"] - START["x"]), np.asarray(state.fisher["x"])
    np.testing.assert_allclose(grads["x"], w["x"] - 0.2 + 6.0 * fisher * drift, rtol=1e-5)
    assert float(metrics["penalty"]) == pytest.approx(3.0 * np.sum(fisher * drift**2), rel=1e-5)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("lam", "moved"), [(0.0, 0.5), (1e9, 0.0)])
def test_without_lambda_and_at_the_start_it_is_sft(lam, moved):
    w, batches = {"x": START["x"] + moved}, {"user": jnp.asarray(0.2)}
    ours = Ewc(lam=lam).gradient(Quadratic(), w, batches, prepared(Ewc()), KEY)[0]
    np.testing.assert_array_equal(
        ours["x"], Sft().gradient(Quadratic(), w, batches, (), KEY)[0]["x"]
    )


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_impossible_values_name_the_key(bad):
    with pytest.raises(InputError, match=r"config\.defence\.lam"):
        Ewc(lam=bad)
