"""Panacea's gradient on losses whose answer is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.defences import Panacea, Sft
from panacea_jax.defences.panacea import HARMFUL_LOSS_CLAMP
from panacea_jax.errors import InputError

KEY = jax.random.key(0)
W = {"x": jnp.asarray([1.0, -2.0, 0.5]), "y": jnp.asarray([[0.3, 2.0]])}
CURVES = jnp.asarray([1.0, 2.0, 3.0])


def loss(w, batch):
    """½ Σ c_i (x_i − t)² + Σ y t for target t: quadratic in x, linear in y."""
    return 0.5 * jnp.sum(CURVES * (w["x"] - batch) ** 2) + jnp.sum(w["y"]) * batch


def gradient_by_hand(x, t):
    return np.concatenate([np.asarray(CURVES) * (x - t), np.full(2, t)])


BATCHES = {"user": jnp.asarray(0.2), "harmful": jnp.asarray(-0.4)}


def flat(tree):
    return np.concatenate([np.asarray(v).ravel() for v in jax.tree.leaves(tree)])


def run(defence, batches=BATCHES, w=W, state=None):
    state = defence.init(w) if state is None else state
    return defence.gradient(loss, w, batches, state, KEY)


def test_the_gradient_is_g_minus_lambda_times_the_difference():
    rho, lam = 0.3, 0.7
    grads, state, metrics = run(Panacea(rho=rho, lam=lam, clamp="none"))
    x, t = np.asarray(W["x"]), -0.4
    g, h = gradient_by_hand(x, 0.2), gradient_by_hand(x, t)
    epsilon = rho * h / (np.linalg.norm(h) + 1e-7)
    h_perturbed = gradient_by_hand(x + epsilon[:3], t)
    np.testing.assert_allclose(flat(grads), g - lam * (h_perturbed - h), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flat(state.epsilon), epsilon, rtol=1e-5)
    assert float(metrics["cos_gh"]) == pytest.approx(
        g @ h / np.linalg.norm(g) / np.linalg.norm(h), rel=1e-5
    )
    assert float(metrics["poison_estimate"]) == pytest.approx(g @ h / (h @ h), rel=1e-5)
    assert float(metrics["term_ratio"]) == pytest.approx(
        lam * np.linalg.norm(h_perturbed - h) / np.linalg.norm(g), rel=1e-4
    )


def test_the_difference_is_a_finite_difference_of_what_the_term_maximises():
    """h' − h is the gradient by w of L_harm(w + ε) − L_harm(w) with ε held still."""
    grads, state, _ = run(Panacea(rho=0.3, lam=1.0, clamp="none"))
    plain, _, _ = run(Sft())
    difference = flat(plain) - flat(grads)

    def gain(w):
        return loss(jax.tree.map(jnp.add, w, state.epsilon), BATCHES["harmful"]) - loss(
            w, BATCHES["harmful"]
        )

    for i in range(3):
        step = jnp.zeros(3).at[i].set(1e-2)
        slope = (gain(W | {"x": W["x"] + step}) - gain(W | {"x": W["x"] - step})) / 2e-2
        assert float(slope) == pytest.approx(difference[i], abs=1e-3)


def test_epsilon_raises_the_harmful_loss():
    _, _, metrics = run(Panacea(rho=0.3, lam=0.1))
    assert metrics["harmful_loss_perturbed"] > metrics["harmful_loss"]


@pytest.mark.parametrize("defence", [Panacea(rho=0.5, lam=0.0), Panacea(rho=0.0, lam=0.5)])
def test_without_lambda_or_rho_the_update_is_sft(defence):
    np.testing.assert_allclose(flat(run(defence)[0]), flat(run(Sft())[0]), rtol=1e-6, atol=1e-6)


def test_above_the_clamp_the_update_is_g_plus_lambda_h():
    high = {"user": jnp.asarray(0.2), "harmful": jnp.asarray(-3.0)}
    grads, _, metrics = run(Panacea(rho=1.0, lam=0.5), high)
    assert metrics["harmful_loss_perturbed"] > HARMFUL_LOSS_CLAMP and metrics["clamped"] == 1
    x = np.asarray(W["x"])
    np.testing.assert_allclose(
        flat(grads), gradient_by_hand(x, 0.2) + 0.5 * gradient_by_hand(x, -3.0), rtol=1e-5
    )
    assert run(Panacea(rho=1.0, lam=0.5, clamp="none"), high)[2]["clamped"] == 0


def test_exactly_on_the_clamp_the_gradient_still_flows():
    """As torch.clamp: the derivative at the bound is 1, not 0 and not ½."""
    w = {"x": jnp.zeros(3), "y": jnp.asarray([[2.5, 2.5]])}
    batches = {"user": jnp.asarray(0.0), "harmful": jnp.asarray(1.0)}

    def linear(w, batch):
        return jnp.sum(w["y"]) * batch

    defence = Panacea(rho=0.0, lam=1.0)
    grads, _, metrics = defence.gradient(linear, w, batches, defence.init(w), KEY)
    assert float(metrics["harmful_loss_perturbed"]) == HARMFUL_LOSS_CLAMP
    assert not flat(grads).any()  # g = 0 and h' = h


def test_a_zero_harmful_gradient_gives_zero_epsilon():
    def only_user(w, batch):
        return jnp.where(batch > 0, loss(w, batch), 0.0)

    defence = Panacea(rho=1.0, lam=0.5)
    grads, state, metrics = defence.gradient(only_user, W, BATCHES, defence.init(W), KEY)
    assert not flat(state.epsilon).any()
    np.testing.assert_allclose(flat(grads), flat(run(Sft())[0]))
    assert all(np.isfinite(float(v)) for v in metrics.values())


def test_every_refreshes_on_schedule_and_keeps_the_difference():
    defence = Panacea(rho=0.3, lam=0.7, every=2, clamp="none")
    first, state, _ = run(defence)
    moved = jax.tree.map(lambda x: x + 0.5, W)
    held, state, _ = run(defence, w=moved, state=state)
    expected = flat(run(Sft(), w=moved)[0]) - (flat(run(Sft())[0]) - flat(first))
    np.testing.assert_allclose(flat(held), expected, rtol=1e-5, atol=1e-6)
    fresh, state, _ = run(defence, w=moved, state=state)
    alone, _, _ = run(Panacea(rho=0.3, lam=0.7, clamp="none"), w=moved)
    np.testing.assert_allclose(flat(fresh), flat(alone), rtol=1e-5)
    assert int(state.steps) == 3


def test_the_mean_epsilon_is_the_mean_of_those_computed():
    defence = Panacea(rho=0.3, lam=0.1)
    state, seen = defence.init(W), []
    for t in (-0.4, 0.9, 0.1):
        _, state, _ = run(
            defence, {"user": BATCHES["user"], "harmful": jnp.asarray(t)}, state=state
        )
        seen.append(flat(state.epsilon))
    np.testing.assert_allclose(flat(state.epsilon_mean), np.mean(seen, axis=0), rtol=1e-5)


def test_finish_adds_epsilon():
    defence = Panacea(rho=0.3)
    _, state, _ = run(defence)
    np.testing.assert_array_equal(flat(defence.finish(W, state)), flat(W) + flat(state.epsilon))


def test_harmful_records_without_loss_leave_epsilon_as_it_was():
    """A last batch of them does not deploy w alone; that step is SFT's."""

    def weighed(w, batch):
        return batch[1] * loss(w, batch[0])

    defence = Panacea(rho=0.3, lam=0.7)
    user, state = jnp.asarray([0.2, 1.0]), defence.init(W)
    _, state, _ = defence.gradient(weighed, W, {"user": user, "harmful": jnp.asarray([-0.4, 1.0])}, state, KEY)
    before = flat(state.epsilon)
    grads, state, metrics = defence.gradient(weighed, W, {"user": user, "harmful": jnp.asarray([-0.4, 0.0])}, state, KEY)
    assert metrics["norm_h"] == 0 and np.linalg.norm(before) == pytest.approx(0.3, rel=1e-5)
    np.testing.assert_array_equal(flat(state.epsilon), before)
    np.testing.assert_allclose(flat(grads), flat(run(Sft())[0]), rtol=1e-6)


def test_rho_by_layer():
    w = {"x": jnp.asarray([[1.0], [2.0]])}
    defence = Panacea(rho=(0.1, 0.4))

    def quadratic(w, batch):
        return jnp.sum(w["x"] ** 2)

    _, state, _ = defence.gradient(quadratic, w, BATCHES, defence.init(w), KEY)
    np.testing.assert_allclose(state.epsilon["x"], [[0.1], [0.4]], rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("rho", -1.0),
        ("rho", float("nan")),
        ("rho", float("inf")),
        ("lam", -0.1),
        ("lam", float("nan")),
        ("every", 0),
    ],
)
def test_impossible_values_name_the_key(key, bad):
    with pytest.raises(InputError, match=f"config.defence.{key}"):
        Panacea(**{key: bad})
