"""Booster, and Booster + Vaccine: five steps equal PyTorch's, and the limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.defences import Booster, BoosterVaccine, Loss, Sft, Vaccine
from panacea_jax.errors import InputError
from tests.defences.five_steps import (
    assert_equal_tensors,
    run,
    setting,
    start_tensors,
    streams,
    torch_model,
    torch_steps,
    wide_setting,
)
from tests.defences.oracles import booster as oracle

__all__ = ["setting", "wide_setting"]  # fixtures

KEY = jax.random.key(0)


METHODS = [
    (Booster(lam=2.0, alpha=0.3), {"lam": 2.0, "alpha": 0.3}),
    (BoosterVaccine(lam=2.0, alpha=0.3, rho=0.7), {"lam": 2.0, "alpha": 0.3, "rho": 0.7}),
]


def compare(setting, defence, kwargs, full):
    given, theirs = streams(), torch_model(setting, full)
    _, ours = run(setting, defence, given, full)

    def gradient(step):
        user, harmful = (given[n].batch(step) for n in ("user", "harmful"))
        return oracle.gradient(theirs, user, harmful, **kwargs)

    torch_steps(theirs, gradient)
    assert_equal_tensors(ours, theirs, start_tensors(setting, full), setting[3])


@pytest.mark.parametrize(("defence", "kwargs"), METHODS, ids=["booster", "vaccine"])
def test_five_steps(setting, defence, kwargs):
    compare(setting, defence, kwargs, full=False)


@pytest.mark.parametrize(("defence", "kwargs"), METHODS, ids=["booster", "vaccine"])
def test_five_steps_of_all_parameters(wide_setting, defence, kwargs):
    compare(wide_setting, defence, kwargs, full=True)


def test_limits_of_the_pair(wide_setting):
    """λ = 0 and α = 0 leave Vaccine, ρ = 0 leaves Booster."""
    model, adapter, _, _ = wide_setting
    loss = Loss.of(model)
    batches = {n: jax.tree.map(jnp.asarray, s.batch(0)) for n, s in streams().items()}

    def gradient(defence):
        @jax.jit
        def found(loss, w):
            return defence.gradient(loss, w, batches, (), KEY)[0]

        return jax.tree.leaves(found(loss, adapter))

    pairs = [
        (BoosterVaccine(lam=0.0, rho=0.5), Vaccine(rho=0.5)),
        (BoosterVaccine(alpha=0.0, rho=0.5), Vaccine(rho=0.5)),
        (BoosterVaccine(lam=2.0, rho=0.0), Booster(lam=2.0)),
    ]
    for ours, other in pairs:
        for a, b in zip(gradient(ours), gradient(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)


def cubic(w, batch):
    return jnp.sum(batch * w["x"] ** 3) + w["x"][0] * w["x"][1]


@pytest.mark.parametrize("bare", [{"lam": 0.0}, {"alpha": 0.0}])
def test_without_lambda_or_alpha_booster_is_sft(bare):
    w = {"x": jnp.asarray([0.3, -0.7, 1.1])}
    batches = {"user": jnp.asarray(0.4), "harmful": jnp.asarray(1.3)}
    ours, _, _ = Booster(**bare).gradient(cubic, w, batches, (), KEY)
    plain, _, _ = Sft().gradient(cubic, w, batches, (), KEY)
    np.testing.assert_array_equal(ours["x"], plain["x"])


def test_for_small_alpha_the_term_is_alpha_times_the_curvature_along_h():
    """(h − h') / α → ∇²L · h/‖h‖."""
    with jax.enable_x64(True):
        w = {"x": jnp.asarray([0.3, -0.7, 1.1])}
        batches = {"user": jnp.asarray(0.4), "harmful": jnp.asarray(1.3)}
        h = jax.grad(cubic)(w, batches["harmful"])["x"]
        hessian = jax.hessian(lambda x: cubic({"x": x}, batches["harmful"]))(w["x"])
        wanted = hessian @ h / jnp.linalg.norm(h)
        f = jax.grad(cubic)(w, batches["user"])["x"]
        for alpha in (1e-2, 1e-4):
            defence = Booster(lam=3.0, alpha=alpha)
            grads, _, _ = defence.gradient(cubic, w, batches, (), KEY)
            found = (grads["x"] - f) / (3.0 * alpha)
            np.testing.assert_allclose(found, wanted, atol=10 * alpha)


def test_the_simulated_step_lowers_the_harmful_loss():
    w = {"x": jnp.asarray([0.3, -0.7, 1.1])}
    batches = {"user": jnp.asarray(0.4), "harmful": jnp.asarray(1.3)}
    _, _, metrics = Booster(alpha=0.01).gradient(cubic, w, batches, (), KEY)
    drop = float(metrics["harmful_loss"] - metrics["harmful_loss_attacked"])
    assert drop == pytest.approx(0.01 * float(metrics["norm_h"]), rel=0.05)


@pytest.mark.parametrize("defence", [Booster, BoosterVaccine])
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["lam", "alpha", "rho"])
def test_impossible_values_name_the_key(defence, key, bad):
    if key == "rho" and defence is Booster:
        pytest.skip("Booster has no ρ")
    with pytest.raises(InputError, match=f"config.defence.{key}"):
        defence(**{key: bad})
