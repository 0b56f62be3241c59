"""The ρ-sphere and the ρ-ball against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from panacea_jax.perturbation import norms, onto_ball, to_sphere


def tree(seed=0, scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 4, 2), "b": {"c": (3, 5)}}
    return jax.tree.map(
        lambda s: jnp.asarray(scale * rng.normal(size=s), dtype),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def flat(t):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)])


def sphere(h, rho):
    return to_sphere(rho).update(h, optax.EmptyState())[0]


@pytest.mark.parametrize("rho", [0.25, 1.0, 7.0])
def test_sphere_is_the_reference_formula(rho):
    h = tree()
    expected = rho * flat(h) / (np.linalg.norm(flat(h)) + 1e-7)
    np.testing.assert_allclose(flat(sphere(h, rho)), expected, rtol=1e-6)
    assert abs(np.linalg.norm(flat(sphere(h, rho))) / rho - 1) < 1e-6


def test_sphere_of_zero_is_zero():
    assert not flat(sphere(tree(scale=0.0), 1.0)).any()


def test_sphere_guard_is_on_the_norm_not_its_square():
    h = {"x": jnp.asarray([1e-7], jnp.float32)}
    np.testing.assert_allclose(flat(sphere(h, 1.0)), [0.5], rtol=1e-5)


def test_sphere_per_layer():
    h, rho = tree(), jnp.asarray([0.5, 1.0, 2.0])
    np.testing.assert_allclose(norms(sphere(h, rho), per_layer=True), rho, rtol=1e-6)
    by_hand = np.linalg.norm(
        np.concatenate([np.asarray(h["a"][1]).ravel(), np.asarray(h["b"]["c"][1])])
    )
    np.testing.assert_allclose(norms(h, per_layer=True)[1], by_hand, rtol=1e-6)


def ball(epsilon, update, rho):
    step = onto_ball(rho).update(update, optax.EmptyState(), epsilon)[0]
    return optax.apply_updates(epsilon, step)


def test_ball_projects_what_leaves_it():
    epsilon, update = tree(0, 0.1), tree(1)
    moved = flat(epsilon) + flat(update)
    np.testing.assert_allclose(
        flat(ball(epsilon, update, 0.5)), 0.5 * moved / np.linalg.norm(moved), rtol=1e-5, atol=1e-7
    )


def test_ball_leaves_the_inside_alone():
    epsilon, update = tree(0, 0.01), tree(1, 0.01)
    np.testing.assert_allclose(
        flat(ball(epsilon, update, 50.0)), flat(epsilon) + flat(update), rtol=1e-5, atol=1e-8
    )


def test_ball_of_radius_zero():
    assert np.abs(flat(ball(tree(scale=0.0), tree(scale=0.0), 0.0))).max() == 0
    assert np.abs(flat(ball(tree(), tree(1), 0.0))).max() < 1e-6


def test_ball_per_layer():
    rho = jnp.asarray([0.1, 100.0, 0.3])
    out = ball(tree(), tree(1), rho)
    lengths = np.asarray(norms(out, per_layer=True))
    np.testing.assert_allclose(lengths[[0, 2]], [0.1, 0.3], rtol=1e-5)
    np.testing.assert_allclose(
        out["a"][1], np.asarray(tree()["a"][1]) + np.asarray(tree(1)["a"][1]), rtol=1e-5, atol=1e-6
    )


def test_ascent_chain_climbs_a_parabola_to_the_edge():
    """Maximise −‖ε − c‖² with c outside the ball: the best point of the ball is ρ c/‖c‖."""
    c, rho = jnp.asarray([3.0, 4.0]), 2.0
    climb = optax.chain(optax.sgd(-0.1), onto_ball(rho))
    epsilon = jnp.zeros(2)
    state = climb.init(epsilon)
    for _ in range(100):
        gradient = -2 * (epsilon - c)
        updates, state = climb.update(gradient, state, epsilon)
        epsilon = optax.apply_updates(epsilon, updates)
    np.testing.assert_allclose(epsilon, rho * np.asarray(c) / 5, atol=1e-5)


def test_ball_needs_the_iterate():
    with pytest.raises(ValueError, match="params"):
        onto_ball(1.0).update(tree(), optax.EmptyState())
