"""KL: the divergence against torch's kl_div, padding, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from panacea_jax.data.batches import pad
from panacea_jax.data.encode import Example
from panacea_jax.defences import Kl, Loss, Sft
from panacea_jax.defences.kl import divergence
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.model import load
from tests.tiny import write_model

KEY = jax.random.key(0)


def logits(seed):
    return np.random.default_rng(seed).normal(size=(3, 5, 7), scale=3).astype(np.float32)


def test_the_divergence_is_torchs_of_student_and_teacher():
    everywhere = jnp.ones((3, 5), bool)
    ours = divergence(jnp.asarray(logits(0)), jnp.asarray(logits(1)), everywhere).sum() / 3
    student = torch.log_softmax(torch.tensor(logits(0)), dim=-1)
    teacher = torch.softmax(torch.tensor(logits(1)), dim=-1)
    expected = torch.nn.functional.kl_div(student, teacher, reduction="batchmean")
    assert float(ours) == pytest.approx(expected.item(), rel=1e-5)


def test_positions_that_do_not_count_have_no_part():
    counts = jnp.arange(5) < jnp.asarray([[5], [2], [0]])
    per_token = np.asarray(divergence(jnp.asarray(logits(0)), jnp.asarray(logits(1)), counts))
    assert (per_token[np.asarray(counts)] > 0).all()
    assert not per_token[~np.asarray(counts)].any()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A loss, a starting adapter and one that has moved."""
    model = load(write_model(tmp_path_factory.mktemp("tiny") / "base"), dtype="float32")
    start = lora.init(model, 2, 4, ("q", "up"), key=KEY)
    moved = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(KEY, x.shape), start)
    return Loss.of(model), start, moved


EXAMPLES = [Example.answering(np.arange(3, 3 + n, dtype=np.int32), 2) for n in (9, 6)]


def gradient(tiny, defence, length=16, rows=2, at_start=False):
    loss, start, moved = tiny
    batch = jax.tree.map(jnp.asarray, pad(EXAMPLES, length, rows))
    w, state = start if at_start else moved, defence.init(start)
    return jax.jit(lambda loss: defence.gradient(loss, w, {"user": batch}, state, KEY))(loss)


def assert_close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=tolerance * float(jnp.abs(y).max()))


def test_padding_has_no_part(tiny):
    """Longer rows and a row without tokens change nothing."""
    short, _, metrics = gradient(tiny, Kl(lam=2.0))
    long, _, again = gradient(tiny, Kl(lam=2.0), length=24, rows=3)
    assert float(metrics["kl"]) > 1e-3
    assert float(again["kl"]) == pytest.approx(float(metrics["kl"]), rel=1e-5)
    assert_close(long, short)


def test_limits_are_sft(tiny):
    """Without λ, and at the start, where the divergence has its minimum."""
    assert_close(gradient(tiny, Kl(lam=0.0))[0], gradient(tiny, Sft())[0], 1e-6)
    still, _, metrics = gradient(tiny, Kl(lam=2.0), at_start=True)
    assert float(metrics["kl"]) == pytest.approx(0, abs=1e-6)
    assert_close(still, gradient(tiny, Sft(), at_start=True)[0])


def bytes_of(leaves):
    return sum(x.size * x.dtype.itemsize for x in leaves)


def beside_the_base(tiny, defence):
    """Bytes that a step is given or has in its program, less those of the base, in adapters."""
    loss, start, _ = tiny
    batch = jax.tree.map(jnp.asarray, pad(EXAMPLES, 16, 2))

    def step(weights, w, state, batch):
        loss_fn = Loss(loss.model, weights)
        return defence.gradient(loss_fn, w, {"user": batch}, state, KEY)

    whole = jax.jit(step).trace(loss.weights, start, defence.init(start), batch).jaxpr
    base, adapter = (bytes_of(jax.tree.leaves(tree)) for tree in (loss.weights, start))
    assert base > 10 * adapter
    return (bytes_of([*whole.in_avals, *whole.consts]) - base) / adapter


def test_no_second_base(tiny):
    """The teacher is the starting adapter on the same base: two adapters and a batch."""
    assert 2 < beside_the_base(tiny, Kl()) < 3 and beside_the_base(tiny, Sft()) < 2


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_impossible_values_name_the_key(bad):
    with pytest.raises(InputError, match=r"config\.defence\.lam"):
        Kl(lam=bad)
