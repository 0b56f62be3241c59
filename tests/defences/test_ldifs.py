"""LDIFS: the penalty by hand, its gate, and that padding has no part in the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.data.batches import pad
from panacea_jax.data.encode import Example
from panacea_jax.defences import Ldifs, Loss, Sft
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.model import load
from tests.defences.test_kl import beside_the_base
from tests.tiny import write_model

KEY = jax.random.key(0)


def features():
    """Features of 3 layers that drift more and more, ``[3, 2, 5, 4]``, and which tokens are valid."""
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(3, 2, 5, 4)).astype(np.float32)
    drift = rng.normal(size=(3, 2, 5, 4)) * np.asarray([0.01, 0.1, 1.0])[:, None, None, None]
    valid = np.arange(5) < np.asarray([[5], [2]])
    return (reference + drift).astype(np.float32), reference, valid


def by_hand(rho):
    moved, reference, valid = features()
    return [rho / 2 * np.sum((m - r)[valid] ** 2) for m, r in zip(moved, reference)]


@pytest.mark.parametrize(("gate", "counted"), [(0.1, 1), (1.0, 2), (float("inf"), 3)])
def test_layers_count_while_they_are_below_the_gate(gate, counted):
    penalty, n = Ldifs(rho=2.0, gate=gate)._penalty(*map(jnp.asarray, features()))
    assert int(n) == counted
    expected = sum(q for q in by_hand(2.0) if q < gate)
    assert float(penalty) == pytest.approx(expected, rel=1e-4)


def test_a_layer_beyond_the_gate_has_no_gradient():
    moved, reference, valid = map(jnp.asarray, features())
    slope = jax.grad(lambda x: Ldifs(rho=2.0, gate=1.0)._penalty(x, reference, valid)[0])(moved)
    expected = np.where(np.asarray(valid)[..., None], 2.0 * (moved - reference), 0)
    np.testing.assert_allclose(slope[:2], expected[:2], rtol=1e-5)
    assert not np.asarray(slope[2]).any()


def test_without_a_gate_the_mean_counts():
    penalty, n = Ldifs(rho=2.0, gate=0)._penalty(*map(jnp.asarray, features()))
    assert int(n) == 3
    assert float(penalty) == pytest.approx(sum(by_hand(2.0)) / (7 * 4), rel=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A loss, a starting adapter and one that has moved."""
    model = load(write_model(tmp_path_factory.mktemp("tiny") / "base"), dtype="float32")
    start = lora.init(model, 2, 4, ("q", "up"), key=KEY)
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), start)
    return Loss.of(model), start, moved


EXAMPLES = [Example.answering(np.arange(3, 3 + n, dtype=np.int32), 2) for n in (9, 6)]


def gradient(tiny, defence, length=16, rows=2, at_start=False):
    loss, start, moved = tiny
    batch = jax.tree.map(jnp.asarray, pad(EXAMPLES, length, rows))
    w = start if at_start else moved
    state = defence.init(start)
    return jax.jit(lambda loss: defence.gradient(loss, w, {"user": batch}, state, KEY))(loss)


def assert_close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=tolerance * float(jnp.abs(y).max()))


@pytest.mark.parametrize("gate", [0.0, float("inf")])
def test_padding_has_no_part(tiny, gate):
    """Longer rows and a row without tokens change nothing."""
    defence = Ldifs(rho=1.0, gate=gate)
    short, _, metrics = gradient(tiny, defence)
    long, _, again = gradient(tiny, defence, length=24, rows=3)
    assert float(metrics["penalty"]) > 1e-5
    assert float(again["penalty"]) == pytest.approx(float(metrics["penalty"]), rel=1e-5)
    assert_close(long, short)


def test_limits_are_sft(tiny):
    """Without ρ, and at the start."""
    assert_close(gradient(tiny, Ldifs(rho=0.0))[0], gradient(tiny, Sft())[0], 1e-6)
    still, _, metrics = gradient(tiny, Ldifs(rho=1.0), at_start=True)
    assert metrics["penalty"] == 0 and metrics["layers_counted"] == 2
    assert_close(still, gradient(tiny, Sft(), at_start=True)[0], 1e-6)


def test_no_second_base(tiny):
    """The reference is the starting adapter on the same base: two adapters and a batch."""
    assert 2 < beside_the_base(tiny, Ldifs()) < 3


@pytest.mark.parametrize(
    ("key", "bad"),
    [("rho", -1.0), ("rho", float("inf")), ("gate", -0.1), ("gate", float("nan"))],
)
def test_impossible_values_name_the_key(key, bad):
    with pytest.raises(InputError, match=f"config.defence.{key}"):
        Ldifs(**{key: bad})
