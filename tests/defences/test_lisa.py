"""Lisa on losses whose answer is known in closed form: turns, snapshots, warm-up, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.defences import Lisa, Sft
from panacea_jax.errors import InputError

W = {"x": jnp.asarray([1.0, -2.0, 0.5]), "y": jnp.asarray([[0.3, 2.0]])}
# Batches of different shapes, as the two streams may give.
BATCHES = {"user": jnp.asarray([0.2]), "alignment": jnp.asarray([-0.4, -0.6])}


def loss(w, batch):
    """½ ‖x − mean t‖² + Σ y · mean t."""
    return 0.5 * jnp.sum((w["x"] - batch.mean()) ** 2) + jnp.sum(w["y"]) * batch.mean()


def flat(tree):
    return np.concatenate([np.asarray(v).ravel() for v in jax.tree.leaves(tree)])


def by_hand(w, target):
    return np.concatenate([np.asarray(w["x"]) - target, np.full(2, target)])


def walk(defence, steps, rate=0.1):
    """Gradient descent: parameters before each step, gradients, metrics, and the last state."""
    step = jax.jit(lambda w, s: defence.gradient(loss, w, BATCHES, s, jax.random.key(0)))
    w, state = W, defence.init(W)
    seen, grads, metrics = [], [], []
    for _ in range(steps):
        g, state, m = step(w, state)
        seen, grads, metrics = [*seen, w], [*grads, g], [*metrics, m]
        w = jax.tree.map(lambda w, g: w - rate * g, w, g)
    return seen, grads, metrics, state


def test_turns_and_anchors():
    """K1 = 2, K2 = 3: A A U U U A A U …; the anchor is w before the first step of each turn."""
    defence = Lisa(rho=0.7, alignment_steps=2, finetune_steps=3, warmup_steps=1)
    seen, grads, metrics, state = walk(defence, 8)
    turns = [0, 0, 2, 2, 2, 5, 5, 7]
    for t, start in enumerate(turns):
        aligning = t in (0, 1, 5, 6)
        drift = flat(seen[t]) - flat(seen[start])
        expected = by_hand(seen[t], -0.5 if aligning else 0.2) + (0.7 if t else 0) * drift
        np.testing.assert_allclose(flat(grads[t]), expected, rtol=1e-5, atol=1e-6)
        assert metrics[t]["alignment_state"] == aligning
        assert float(metrics[t]["norm_drift"]) == pytest.approx(np.linalg.norm(drift), abs=1e-6)
        pull = 0.35 * np.sum(drift**2) if t else 0
        assert float(metrics[t]["proximal"]) == pytest.approx(pull, rel=1e-5, abs=1e-7)
    np.testing.assert_array_equal(flat(state.anchor), flat(seen[7]))
    assert int(state.steps) == 8


def test_the_term_is_off_during_the_warm_up():
    _, grads, metrics, _ = walk(
        Lisa(rho=5.0, alignment_steps=1, finetune_steps=9, warmup_steps=4), 6
    )
    _, free, _, _ = walk(Lisa(rho=0.0, alignment_steps=1, finetune_steps=9, warmup_steps=0), 6)
    same = [np.array_equal(flat(a), flat(b)) for a, b in zip(grads, free)]
    assert same == [True] * 4 + [False] * 2
    assert [float(m["proximal"]) > 0 for m in metrics] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("total", [1, 5, 9, 10, 11, 19, 20, 2000, 2005])
def test_the_warm_up_is_the_first_tenth_as_the_public_code_counts(total):
    """There the term acts on the steps 0, 1, … that are above a tenth of the total."""
    warmup = Lisa().for_steps(total).warmup_steps
    assert [t >= warmup for t in range(total)] == [10 * t > total for t in range(total)]


def test_a_warm_up_that_is_set_stays():
    assert Lisa(warmup_steps=3).for_steps(1000).warmup_steps == 3


def test_an_unknown_warm_up_is_an_error():
    with pytest.raises(ValueError, match="for_steps"):
        walk(Lisa(), 1)


def plain(batch, steps=4):
    """SFT on one of the two batches."""
    w, grads = W, []
    for _ in range(steps):
        batches = {"user": BATCHES[batch]}
        grads.append(Sft().gradient(loss, w, batches, (), jax.random.key(0))[0])
        w = jax.tree.map(lambda w, g: w - 0.1 * g, w, grads[-1])
    return grads


@pytest.mark.parametrize(("k1", "k2", "batch"), [(0, 2, "user"), (2, 0, "alignment")])
def test_one_state_without_rho_is_sft_on_its_data(k1, k2, batch):
    grads = walk(Lisa(rho=0.0, alignment_steps=k1, finetune_steps=k2, warmup_steps=0), 4)[1]
    for a, b in zip(grads, plain(batch)):
        np.testing.assert_allclose(flat(a), flat(b), rtol=1e-6)


@pytest.mark.parametrize(("k1", "k2", "target"), [(0, 2, 0.2), (2, 0, -0.5)])
def test_one_state_is_tied_to_the_start(k1, k2, target):
    defence = Lisa(rho=0.7, alignment_steps=k1, finetune_steps=k2, warmup_steps=0)
    seen, grads, _, state = walk(defence, 5)
    for w, g in zip(seen, grads):
        expected = by_hand(w, target) + 0.7 * (flat(w) - flat(W))
        np.testing.assert_allclose(flat(g), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(flat(state.anchor), flat(W))


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("rho", -1.0),
        ("rho", float("nan")),
        ("alignment_steps", -1),
        ("finetune_steps", -1),
        ("warmup_steps", -1),
    ],
)
def test_impossible_values_name_the_key(key, bad):
    with pytest.raises(InputError, match=f"config.defence.{key}"):
        Lisa(**{key: bad})


def test_no_steps_at_all():
    with pytest.raises(InputError, match=r"config\.defence\.finetune_steps"):
        Lisa(alignment_steps=0, finetune_steps=0)
