"""The order of records: a pure function, in epochs that are permutations."""

import collections
import os
import subprocess
import sys

import numpy as np
import pytest

from panacea_jax.data import order
from panacea_jax.data.order import indices

PHILOX = [5599841837815857887, 15655913098571550255, 2880178291573394738]
PINNED = [5, 6, 3, 2, 7, 0, 4, 1, 9, 8]


def run(seed: int, stream: str, steps: int, batch: int, n: int, shuffle: bool = True) -> np.ndarray:
    found = [indices(seed, stream, step, batch, n, shuffle) for step in range(steps)]
    return np.concatenate(found)


@pytest.mark.parametrize(("batch", "n"), [(10, 999), (3, 7), (5, 5), (7, 3), (4, 1)])
def test_unshuffled_is_the_contract(batch: int, n: int):
    for step in (0, 1, 2, 17, 1000):
        found = indices(0, "user", step, batch, n, False)
        assert found.tolist() == [(step * batch + j) % n for j in range(batch)]
        assert found.dtype == np.int64


@pytest.mark.parametrize(("batch", "n"), [(10, 99), (3, 7), (5, 5), (7, 3), (4, 1)])
def test_epochs_are_permutations(batch: int, n: int):
    steps = -(-4 * n // batch)
    epochs = run(3, "user", steps, batch, n)[: 4 * n].reshape(4, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    if n > 50:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_any_step_alone_equals_the_run():
    whole = run(1, "harmful", 60, 8, 50).reshape(60, 8)
    for step in (59, 0, 31, 7, 6):  # 6 straddles two epochs
        order._permutation.cache_clear()
        assert (indices(1, "harmful", step, 8, 50, True) == whole[step]).all()


def test_streams_do_not_move_each_other():
    alone = run(1, "user", 20, 8, 50)
    between = []
    for step in range(20):
        indices(1, "harmful", 3 * step, 5, 40, True)
        between.append(indices(1, "user", step, 8, 50, True))
    assert (np.concatenate(between) == alone).all()
    for other in (run(1, "harmful", 20, 8, 50), run(2, "user", 20, 8, 50)):
        # Independent permutations agree in about one place an epoch.
        assert (other == alone).mean() < 0.15


def test_permutations_are_uniform():
    counts = collections.Counter(
        tuple(indices(seed, "user", 0, 3, 3, True).tolist()) for seed in range(600)
    )
    assert len(counts) == 6
    # Chi-square with 5 degrees of freedom stays below 20.5 with probability 0.999.
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 20.5


def test_the_order_is_fixed_for_ever():
    """Runs resume under other versions of numpy and Python: these numbers may never change."""
    words = np.random.Philox(key=1).random_raw(3).tolist()
    assert words == PHILOX
    assert indices(0, "user", 0, 10, 10, True).tolist() == PINNED


def test_another_process_agrees():
    code = (
        "from panacea_jax.data.order import indices;"
        "print(indices(5, 'alignment', 11, 6, 23, True).tolist())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert out.strip() == str(indices(5, "alignment", 11, 6, 23, True).tolist())


def test_large_seeds_and_steps():
    found = indices(2**70, "user", 10**12, 16, 1000, True)
    assert len(set(found.tolist())) == 16
    assert ((found >= 0) & (found < 1000)).all()


def test_the_cached_permutation_cannot_be_changed():
    found = indices(0, "user", 0, 5, 5, True)
    expected = found.tolist()
    found[:] = -1
    assert indices(0, "user", 0, 5, 5, True).tolist() == expected


@pytest.mark.parametrize(("step", "batch", "n"), [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_impossible(step: int, batch: int, n: int):
    with pytest.raises(ValueError, match="give no batch"):
        indices(0, "user", step, batch, n, True)
