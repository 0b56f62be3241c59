"""Random perturbation: norm, spread, and that it is added once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.defences import RandomPerturbation
from panacea_jax.errors import InputError

W = {"a": jnp.ones((40, 50)), "b": jnp.zeros((30, 20))}


def noise(defence):
    state = defence.init(W)
    out = defence.finish(W, state)
    added = [
        np.asarray(o) - np.asarray(w) for o, w in zip(jax.tree.leaves(out), jax.tree.leaves(W))
    ]
    return np.concatenate([x.ravel() for x in added])


def test_rho_is_the_norm_over_all_tensors():
    assert np.linalg.norm(noise(RandomPerturbation(rho=0.7))) == pytest.approx(0.7, rel=1e-5)


def test_sigma_is_the_standard_deviation_of_each_entry():
    added = noise(RandomPerturbation(sigma=0.3))
    assert added.std() == pytest.approx(0.3, rel=0.05)
    assert abs(added.mean()) < 0.03


def test_seeds_differ_and_repeat():
    first, again, other = (noise(RandomPerturbation(rho=1.0, seed=s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert abs(first @ other) < 0.2


@pytest.mark.parametrize("bad", [{"rho": -1.0}, {"sigma": float("nan")}])
def test_impossible_values(bad):
    with pytest.raises(InputError, match=r"config\.defence\."):
        RandomPerturbation(**bad)
