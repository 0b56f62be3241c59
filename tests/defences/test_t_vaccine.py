"""T-Vaccine's draws and its memory."""

import itertools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from panacea_jax.defences.t_vaccine import draw_layers
from panacea_jax.models.families import config_from_dict
from panacea_jax.parallel import make_mesh
from panacea_jax.worlds.base import LLAMA

ROOT = Path(__file__).parents[2]
LAYERS, HIDDEN, ROWS, LENGTH = 24, 128, 4, 64


def sequential(p, chosen):
    """Probability that so many draws without replacement, each by p among what is left, give this set."""
    total = 0.0
    for order in itertools.permutations(chosen):
        left, product = 1.0, 1.0
        for i in order:
            product *= p[i] / left
            left -= p[i]
        total += product
    return total


def test_draws_have_the_probabilities_of_sequential_sampling():
    """χ² over 10,000 draws of 3 layers of 6; draws by p with equal chances for every set, or without the renormalisation, would fail."""
    p = np.asarray([0.4, 0.05, 0.25, 0.1, 0.02, 0.18])
    sets = list(itertools.combinations(range(6), 3))
    exact = np.asarray([sequential(p, s) for s in sets])
    np.testing.assert_allclose(exact.sum(), 1)
    keys = jax.random.split(jax.random.key(7), 10_000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda k: draw_layers(k, jnp.asarray(p, jnp.float32), 3)))(keys))
    assert (np.diff(drawn, axis=1) > 0).all()
    counts = np.asarray([(drawn == np.asarray(s)).all(axis=1).sum() for s in sets])
    assert counts.sum() == 10_000
    assert stats.chisquare(counts, 10_000 * exact).pvalue > 0.01


@pytest.fixture(scope="module")
def temporaries():
    """Bytes of temporaries that a compiled step needs: ``temporaries(name, remat, layers=S)``."""
    measure = runpy.run_path(str(ROOT / "benchmarks" / "memory.py"))["temporary_bytes"]
    shape = {
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": LAYERS,
    }
    config = config_from_dict(LLAMA | shape)
    return lambda defence, remat="full", **active: measure(
        config, defence, remat, make_mesh(1, 1, 1, devices=jax.devices()[:1]),
        rows=ROWS, length=LENGTH, dtype="float32", rank=2, **active,
    )  # fmt: skip


def test_memory_falls_with_the_number_of_active_layers(temporaries):
    """Well below Vaccine as its code runs it, which keeps all activations; and where both rematerialise, by at least a buffer [B, T, D]
    for each layer that is not active.

    With every layer active nothing of that is saved, so it is the active set that saves and not another difference between the two.
    """
    vaccine, published = (temporaries("vaccine", remat) for remat in ("full", "none"))
    some, every = (temporaries("t_vaccine", layers=n) for n in (2, LAYERS))
    buffer = 4 * ROWS * LENGTH * HIDDEN
    assert some < 0.75 * published
    assert some <= every - (LAYERS - 2) * buffer
    assert every == pytest.approx(vaccine, rel=0.01)
