"""TAR: five outer steps equal PyTorch's with a real inner optimizer, and the limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.data.batches import deinterleave
from panacea_jax.defences import Loss, Sft, Tar
from panacea_jax.defences.tar import negative_entropy
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
from tests.defences.oracles import tar as oracle

__all__ = ["setting", "wide_setting"]  # fixtures

SMALL = {"inner_steps": 4, "inner_every": 2, "inner_learning_rate": 2e-3}


def compare(setting, full):
    defence = Tar(**SMALL, tamper_weight=3.0, retain_weight=0.8)
    given = streams(repeats=5)
    theirs, reference = torch_model(setting, full), torch_model(setting, full)
    result, ours = run(setting, defence, given, full)

    def gradient(step):
        batches = deinterleave(given["harmful"].batch(step), 5)
        single = [jax.tree.map(lambda x, i=i: x[i], batches) for i in range(5)]
        for i, batch in enumerate(single):  # the stream's own batches, one after the other
            plain = streams()["harmful"].batch(5 * step + i)
            np.testing.assert_array_equal(batch.tokens, plain.tokens)
        return oracle.gradient(
            theirs, given["user"].batch(step), single[:-1], single[-1], reference,
            every=2, rate=2e-3, tamper=3.0, retain=0.8,
        )  # fmt: skip

    torch_steps(theirs, gradient)
    assert_equal_tensors(ours, theirs, start_tensors(setting, full), setting[3])
    start = setting[1] if not full else None
    if start is not None:
        for a, b in zip(jax.tree.leaves(result.state.start), jax.tree.leaves(start), strict=True):
            np.testing.assert_array_equal(a, b)


def test_five_steps(setting):
    compare(setting, full=False)


def test_five_steps_of_all_parameters(wide_setting):
    compare(wide_setting, full=True)


@pytest.fixture
def gradient_of(wide_setting):
    """A function: defence → (its gradient at w, flat, and its metrics); the loss; w; the batches."""
    model, adapter, _, _ = wide_setting
    loss = Loss.of(model)
    given = streams(repeats=5)
    batches = {n: jax.tree.map(jnp.asarray, s.batch(0)) for n, s in given.items()}

    def found(defence, start=None, batches=batches):
        state = defence.init(adapter if start is None else start)

        @jax.jit
        def run(loss, w):
            grads, _, metrics = defence.gradient(loss, w, batches, state, jax.random.key(0))
            return grads, metrics

        grads, metrics = run(loss, adapter)
        return flat(grads), metrics

    return found, loss, adapter, batches


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_limits(gradient_of):
    found, loss, w, batches = gradient_of
    # τ = 0 at the start of alignment: SFT. The distance to itself pulls nowhere, whatever rounding says.
    plain, _ = found(Sft())
    np.testing.assert_allclose(found(Tar(**SMALL, tamper_weight=0.0))[0], plain, atol=1e-14)
    # Away from the start the distance pulls too, and is logged.
    elsewhere = jax.tree.map(lambda x: x + 0.01, w)
    pulled, metrics = found(Tar(**SMALL, tamper_weight=0.0), start=elsewhere)
    assert np.linalg.norm(pulled - plain) > 1e-3 and metrics["distance"] > 0
    # An adversary that does not move: the tamper gradient at θ₀, weighted 1 + exp(−2/16).
    still, _ = found(Tar(inner_steps=4, inner_every=2, inner_learning_rate=0.0, retain_weight=0.0))
    held_out = jax.tree.map(lambda x: x[-1], deinterleave(batches["harmful"], 5))
    at_start = jax.jit(jax.grad(negative_entropy, argnums=1))(loss, w, held_out)
    weight = 4.0 * (1 + math.exp(-2 / 16))
    np.testing.assert_allclose(still, weight * flat(at_start), rtol=1e-9, atol=1e-12)


@pytest.fixture
def same(gradient_of):
    """The same harmful batch at every step of the adversary, so that its losses can be compared."""
    batches = gradient_of[3]
    first = deinterleave(batches["harmful"], 5)
    return {**batches, "harmful": jax.tree.map(lambda x: jnp.repeat(x[0], 5, axis=0), first)}


def test_the_attack_lowers_the_harmful_loss(gradient_of, same):
    _, metrics = gradient_of[0](Tar(**SMALL), batches=same)
    assert metrics["harmful_loss_attacked"] < metrics["harmful_loss"]


def test_a_rate_is_drawn_from_a_tuple(gradient_of, same):
    """Every key gives the gradient of one of the rates, and each rate comes."""
    _, loss, w, _ = gradient_of
    rates = (5e-4, 2e-3)

    def gradients(defence, keys):
        one = jax.jit(lambda loss, key: defence._tamper_gradient(loss, w, same["harmful"], key)[0])
        return [flat(one(loss, key)) for key in keys]

    keys = jax.random.split(jax.random.key(0), 8)
    alone = [gradients(Tar(**SMALL | {"inner_learning_rate": r}), keys[:1])[0] for r in rates]
    assert np.linalg.norm(alone[0] - alone[1]) > 1e-3 * np.linalg.norm(alone[0])
    drawn = gradients(Tar(**SMALL | {"inner_learning_rate": rates}), keys)
    found = [[np.allclose(g, a, rtol=1e-9, atol=1e-12) for a in alone] for g in drawn]
    assert {tuple(f) for f in found} == {(True, False), (False, True)}


def test_memory_does_not_grow_with_the_number_of_inner_steps(wide_setting):
    """First order: no activations of the attack are kept."""
    model, adapter, _, _ = wide_setting
    loss = Loss.of(model)

    def temporaries(k):
        defence = Tar(inner_steps=k, inner_every=k // 2)
        batches = {
            n: jax.tree.map(jnp.asarray, s.batch(0)) for n, s in streams(repeats=k + 1).items()
        }

        def step(loss, w, batches, start):
            state = defence.init(w)._replace(start=start)
            return defence.gradient(loss, w, batches, state, jax.random.key(0))[0]

        lowered = jax.jit(step).lower(loss, adapter, batches, adapter)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(2), temporaries(16)
    assert many < 1.05 * few, (few, many)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("inner_steps", {"inner_steps": 0}),
        ("inner_every", {"inner_every": 0}),
        ("inner_every", {"inner_steps": 6, "inner_every": 4}),
        ("inner_learning_rate", {"inner_learning_rate": -1e-5}),
        ("inner_learning_rate", {"inner_learning_rate": ()}),
        ("inner_learning_rate", {"inner_learning_rate": (1e-5, float("nan"))}),
        ("tamper_weight", {"tamper_weight": float("inf")}),
        ("retain_weight", {"retain_weight": -1.0}),
    ],
)
def test_impossible_values_name_the_key(key, values):
    with pytest.raises(InputError, match=f"config.defence.{key}"):
        Tar(**values)
