"""λ and ρ by what is measured, against the same written in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.data.batches import Stream
from panacea_jax.defences import Loss, Panacea, Sft
from panacea_jax.defences.steering import LEAST_SHARE, OF_AUTO, SHRINK, Steering
from panacea_jax.errors import InputError
from panacea_jax.train.feeding import whole_sets
from tests.defences.test_panacea import BATCHES, W, flat, gradient_by_hand, loss, run
from tests.train.test_loop import LADDER, examples, model, start, streams

__all__ = ["model"]  # a fixture

T_USER, T_HARM = 0.2, -0.4
KEYS = {"clamp": "none", "rho": 0.3, "lam": 5.0}


def value_by_hand(x, t, y):
    return 0.5 * float(np.asarray([1.0, 2.0, 3.0]) @ (x - t) ** 2) + y.sum() * t


def step_by_hand(x, y, rho):
    """g, h, h' and ε at w."""
    g, h = gradient_by_hand(x, T_USER), gradient_by_hand(x, T_HARM)
    epsilon = rho * h / (np.linalg.norm(h) + 1e-7)
    return g, h, gradient_by_hand(x + epsilon[:3], T_HARM), epsilon


X, Y = np.asarray(W["x"], float), np.asarray(W["y"], float)


@pytest.mark.parametrize("tau", [0.1, 0.5, 100.0])
def test_the_cap(tau):
    grads, _, metrics = run(Panacea(tau=tau, **KEYS))
    g, h, up, _ = step_by_hand(X, Y, 0.3)
    lam = min(5.0, tau * np.linalg.norm(g) / np.linalg.norm(up - h))
    assert (lam < 5.0) == (tau < 100)
    np.testing.assert_allclose(flat(grads), g - lam * (up - h), rtol=1e-4, atol=1e-6)
    assert float(metrics["term_ratio"]) <= tau * (1 + 1e-5)
    assert float(metrics["lam"]) == pytest.approx(lam, rel=1e-4)


def test_no_cap_is_the_paper_to_the_bit():
    for none in (None, 0.0):
        np.testing.assert_array_equal(flat(run(Panacea(tau=none, **KEYS))[0]), flat(run(Panacea(**KEYS))[0]))


def test_a_radius_by_the_way_gone():
    """ε = 0 at w₀, so the first step is SFT's; later ‖ε‖ is the share of ‖w − w₀‖, whatever ρ is."""
    defence = Panacea(rho_relative=0.25, **KEYS)
    first, state, _ = run(defence)
    np.testing.assert_array_equal(flat(first), flat(run(Sft())[0]))
    assert not flat(state.epsilon).any()
    moved = {"x": W["x"] + jnp.asarray([3.0, 0.0, 4.0]), "y": W["y"]}
    _, state, _ = run(defence, w=moved, state=state)
    assert np.linalg.norm(flat(state.epsilon)) == pytest.approx(0.25 * 5.0, rel=1e-5)


def test_lambda_by_the_share_of_harm():
    """p̂ = Σ⟨g, h⟩/Σ⟨h, h⟩ over the steps, cut to [0, 1]."""
    defence, state, sums = Panacea(by_poison=True, **KEYS), None, np.zeros(2)
    state = defence.init(W)
    for shift in (0.0, 0.5, -2.0):
        x = X + shift
        g, h, up, _ = step_by_hand(x, Y, 0.3)
        sums += [g @ h, h @ h]
        w = {"x": jnp.asarray(x, jnp.float32), "y": W["y"]}
        grads, state, metrics = run(defence, w=w, state=state)
        share = min(max(sums[0] / sums[1], 0.0), 1.0)
        assert float(metrics["poison_mean"]) == pytest.approx(share, rel=1e-4)
        np.testing.assert_allclose(flat(grads), g - 5.0 * share * (up - h), rtol=1e-4, atol=1e-5)


def test_where_the_user_pulls_the_other_way_it_is_sft():
    """No harm in the user's records: p̂ is cut to 0, and w trains as plain SFT."""

    def opposed(w, batch):
        return -batch * jnp.sum(w["x"] ** 2)

    defence = Panacea(by_poison=True, **KEYS)
    batches = {"user": jnp.asarray(1.0), "harmful": jnp.asarray(-1.0)}
    grads, *_ = defence.gradient(opposed, W, batches, defence.init(W), jax.random.key(0))
    plain, *_ = Sft().gradient(opposed, W, batches, (), jax.random.key(0))
    np.testing.assert_array_equal(flat(grads), flat(plain))




def with_start(defence, value):
    state = defence.init(W)
    return state._replace(steered=state.steered._replace(start_loss=jnp.asarray(value)))


def test_a_ceiling_shrinks_and_grows_the_radius():
    """Shrinks while the loss at w + ε is above that of the start, and grows back to ρ when it is below."""
    defence = Panacea(ceiling=1.0, **(KEYS | {"rho": 1.0, "lam": 0.0}))
    epsilon = step_by_hand(X, Y, 1.0)[3]
    reached = value_by_hand(X + epsilon[:3], T_HARM, Y + epsilon[3:].reshape(1, 2))
    base = value_by_hand(X, T_HARM, Y)
    assert reached > base
    between = (reached + base) / 2
    state, found = with_start(defence, between), []
    for _ in range(40):
        _, state, metrics = run(defence, state=state)
        found.append((float(metrics["norm_epsilon"]), float(metrics["harmful_loss_perturbed"])))
    radii = [r for r, _ in found]
    for (r, high), after in zip(found, radii[1:]):  # each by the rule
        assert after == pytest.approx(r * SHRINK if high > between else min(r / SHRINK, 1.0), rel=1e-4)
    late = [high for _, high in found[20:]]
    assert min(late) <= between <= max(late) and max(late) - min(late) < 0.5 * (reached - base)
    low = with_start(defence, 1e9)
    for _ in range(3):
        _, low, metrics = run(defence, state=low)
    assert float(metrics["norm_epsilon"]) == pytest.approx(1.0, rel=1e-5)


def test_without_harm_the_radius_goes_to_nothing():
    """At w = w₀ the harmful loss is that of the start already."""
    defence = Panacea(ceiling=1.0, **KEYS)
    state = with_start(defence, value_by_hand(X, T_HARM, Y))
    for _ in range(100):
        _, state, metrics = run(defence, state=state)
    assert float(metrics["norm_epsilon"]) < 2 * LEAST_SHARE * 0.3


def test_an_ascent_that_does_not_rise_is_too_long():
    """A step over a ridge: the loss at w + ε is below what a quarter of the slope promised."""
    steering = Steering(1.0, ceiling=1.0)
    state = steering.init(W)._replace(start_loss=jnp.asarray(100.0))
    h = {"x": jnp.asarray([2.0, 0.0, 0.0]), "y": jnp.zeros((1, 2))}
    epsilon = {"x": jnp.asarray([0.5, 0.0, 0.0]), "y": jnp.zeros((1, 2))}  # promises a rise of 1
    for rise, shrinks in ((0.2, True), (0.3, False), (-0.1, True)):
        seen = steering.measure(state, jnp.zeros(()), h, epsilon, jnp.asarray(1.0), jnp.asarray(1 + rise))
        assert (float(seen.share) < 1) == shrinks


def test_the_loss_of_the_start_is_the_mean_over_the_set(model):
    """By tokens, not by batches: that of one batch that holds every record."""
    loss_of, (_, w) = Loss.of(model), start(model, False)
    harmful = streams()["harmful"]
    steering = Steering(1.0, ceiling=2.0)
    seen = steering.look(steering.init(w), loss_of, w, whole_sets(model, Panacea(), {"harmful": harmful})["harmful"])
    whole = Stream("harmful", examples(2), 24, 0, False, LADDER, fixed_length=True).batch(0)
    assert float(seen.start_loss) == pytest.approx(float(loss_of(w, jax.tree.map(jnp.asarray, whole))), rel=1e-5)
    assert Steering(1.0, tau=1.0).look(seen, loss_of, w, []) is seen


def test_auto_is_all_four_and_takes_what_is_set():
    assert Panacea(rho="auto")._steering == OF_AUTO and all(dataclasses.astuple(OF_AUTO))
    given = Panacea(rho="auto", tau=2.0, rho_relative=0.05, lam=77.0)._steering
    assert given == dataclasses.replace(OF_AUTO, tau=2.0, rho_relative=0.05)
    assert not Panacea()._steering and not Panacea(rho=(0.1, 0.2))._steering
    assert Panacea(rho="auto").streams["harmful"].whole_passes == 0.5
    with pytest.raises(InputError, match="config.defence.rho = automatic"):
        Panacea(rho="automatic")


def test_auto_never_lets_the_term_outweigh_the_task():
    """On random quadratics, from wherever it stands: ⟨update, g⟩ > 0, so the task loss falls to first order."""
    defence, rng = Panacea(rho="auto", clamp="none"), np.random.default_rng(0)
    state = with_start(defence, 50.0)
    for _ in range(20):
        w = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 3, jnp.float32), W)
        grads, state, metrics = run(defence, w=w, state=state)
        g = flat(jax.grad(loss)(w, BATCHES["user"]))
        assert flat(grads) @ g >= (1 - OF_AUTO.tau) * (g @ g) * (1 - 1e-4)
        assert float(metrics["term_ratio"]) <= OF_AUTO.tau * (1 + 1e-4)
