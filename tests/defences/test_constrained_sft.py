"""Constrained SFT: five steps against PyTorch, its places and weights by hand, the weighed cross-entropy in chunks, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.tree_util import Partial

from panacea_jax.data.batches import Stream, pack, pad
from panacea_jax.data.encode import Example
from panacea_jax.defences import ConstrainedSft, Sft, cross_entropy
from panacea_jax.defences.constrained_sft import LEAST, place_in_answer, token_weight
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.decoder import Head
from panacea_jax.models.model import load
from panacea_jax.parallel import make_mesh
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests.defences import five_steps
from tests.defences.five_steps import (
    assert_equal_tensors,
    run,
    start_tensors,
    torch_model,
    torch_steps,
)
from tests.defences.oracles import constrained_sft as theirs
from tests.defences.test_kl import EXAMPLES, KEY, assert_close, beside_the_base, tiny  # noqa: F401
from tests.tiny import write_model
from tests.train import test_oracle

setting = five_steps.setting

@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_five_steps(setting, full):
    """Of records with one answer and with two, whose second has first tokens again."""

    def given():
        return {"user": Stream("user", test_oracle.examples(1), 4, 0, False, (32,))}

    *_, tolerance = setting
    beta = 4.0 if full else 60.0  # far from the published one: within five steps weights fall to their floor
    defence = ConstrainedSft(beta=beta, first_factor=3.0, early_factor=10.0, early_tokens=3)
    _, found = run(setting, defence, given(), full)
    model, floored = torch_model(setting, full), []
    oracle = {"beta": beta, "first": 3.0, "early": 10.0, "count": 3, "floored": floored}
    grads = theirs.gradients(model, given()["user"], five_steps.STEPS, **oracle)
    torch_steps(model, lambda step: next(grads))
    assert_equal_tensors(found, model, start_tensors(setting, full), tolerance)
    print("weights at the floor, by step:", floored)
    assert floored[0] == 0 < max(floored)
    plain = run(setting, Sft(), given(), full)[1]
    apart = max(np.linalg.norm(found[n] - x) / np.linalg.norm(x) for n, x in plain.items())
    assert apart > max(1e-3, 10 * tolerance)


def test_places_begin_anew_with_every_answer():
    learnt = [[0, 1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1, 0, 0, 0], [0] * 9]
    places = [[0, 1, 2, 0, 0, 1, 2, 3, 0], [1, 2, 3, 4, 0, 1, 0, 0, 0], [0] * 9]
    assert place_in_answer(jnp.asarray(learnt, bool)).tolist() == places


def test_records_in_one_row_are_answers_of_their_own():
    """A record's first token is never learnt, so that no answer runs on into the next record."""
    apart, together = pad(EXAMPLES, 16, 2), pack([EXAMPLES], 16, 1)
    found = place_in_answer(jnp.asarray(together.loss_mask[:, 1:]))[0].tolist()
    expected = [place_in_answer(jnp.asarray(apart.loss_mask[:, 1:]))[i].tolist()[: len(e.tokens) - 1] for i, e in enumerate(EXAMPLES)]
    assert found[:8] + found[9:14] == expected[0] + expected[1] and max(expected[0]) == 7


def test_the_published_betas():
    """0.5 for the first token, 2 for the second to the fifth, 0.1 behind (arXiv 2406.05946, table 3)."""
    betas = ConstrainedSft()._betas(jnp.ones((1, 7), bool), jnp.dtype("float32"))
    np.testing.assert_allclose(betas[0], [0.5, 2, 2, 2, 2, 0.1, 0.1], rtol=1e-6)
    even = ConstrainedSft(early_tokens=0)._betas(jnp.ones((1, 3), bool), jnp.dtype("float32"))
    np.testing.assert_allclose(even[0], [0.1] * 3, rtol=1e-6)


@pytest.mark.parametrize(("gain", "beta"), [(0.0, 2.0), (1.5, 2.0), (-3.0, 0.5), (9.0, 2.0), (4.0, 0.0)])
def test_weights(gain, beta):
    """``max(2 (1 − σ(β gain)), 10⁻³)``, the gain being of log π."""
    found = float(token_weight(jnp.asarray(beta), jnp.asarray(5.0), jnp.asarray(5.0 - gain)))
    assert found == pytest.approx(max(2 * (1 - 1 / (1 + np.exp(-beta * gain))), 1e-3), rel=1e-4)
    assert gain != 9.0 or found == pytest.approx(LEAST)


@pytest.mark.parametrize("chunk", [16, 10_000])
def test_the_weighed_sum_in_chunks_is_that_of_pytorch(chunk, monkeypatch):
    """Its value is the plain sum, its gradient Σ ω ∇(−log p), by hidden states and head; and the losses of single tokens."""
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        x, matrix = rng.normal(size=(4, 50, 8)), rng.normal(size=(8, 60))
        targets, mask = rng.integers(0, 60, (4, 50)), rng.random((4, 50)) < 0.4
        start, beta = rng.normal(size=(4, 50)) + 4, rng.random((4, 50))
        arrays = [jnp.asarray(a) for a in (targets, mask, start, beta)]

        def ours(matrix, x, weight):
            return cross_entropy.summed_cross_entropy(Head(matrix, False, None), x, *arrays[:2], make_mesh(), scale=weight)

        weight = Partial(token_weight, arrays[3], arrays[2])
        both = jax.jit(jax.value_and_grad(ours, (0, 1)))
        value, found = both(jnp.asarray(matrix), jnp.asarray(x), weight)
        plain, _ = both(jnp.asarray(matrix), jnp.asarray(x), None)
        tokens = jax.jit(lambda m, x: cross_entropy.token_cross_entropy(Head(m, False, None), x, *arrays[:2], make_mesh()))(matrix, x)
    leaves = [torch.tensor(a, requires_grad=True) for a in (matrix, x)]
    logp = torch.log_softmax(leaves[1] @ leaves[0], dim=-1).gather(2, torch.tensor(targets)[..., None])[..., 0]
    omega = 2 * (1 - torch.sigmoid(torch.tensor(beta) * (logp.detach() + torch.tensor(start))))
    assert float(omega.min()) > LEAST
    (torch.where(torch.tensor(mask), -omega * logp, 0)).sum().backward()
    each = np.where(mask, -logp.detach(), 0)
    assert float(value) == float(plain) == pytest.approx(each.sum(), rel=1e-12)
    np.testing.assert_allclose(tokens, each, atol=1e-12)
    for a, b in zip(found, leaves):
        np.testing.assert_allclose(a, b.grad, atol=1e-12)


def gradient(tiny, defence, length=16, rows=2, at_start=False):  # noqa: F811
    loss, start, moved = tiny
    batch = jax.tree.map(jnp.asarray, pad(EXAMPLES, length, rows))
    w, state = start if at_start else moved, defence.init(start)
    return jax.jit(lambda loss: defence.gradient(loss, w, {"user": batch}, state, KEY))(loss)


def test_limits_are_sft(tiny):  # noqa: F811
    """Without β, and at the start, where every weight is 1; elsewhere not. The loss is SFT's everywhere."""
    plain, _, sft = gradient(tiny, Sft())
    assert_close(gradient(tiny, ConstrainedSft(beta=0.0))[0], plain, 1e-6)
    found, _, metrics = gradient(tiny, ConstrainedSft(beta=2.0))
    assert float(metrics["loss"]) == pytest.approx(float(sft["loss"]), rel=1e-6)
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain))) > 1e-3
    still, _, metrics = gradient(tiny, ConstrainedSft(beta=2.0), at_start=True)
    assert float(metrics["loss_start"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert_close(still, gradient(tiny, Sft(), at_start=True)[0])


def test_padding_has_no_part(tiny):  # noqa: F811
    """Longer rows, whose logits are made in chunks, and a row without tokens change nothing."""
    short, _, metrics = gradient(tiny, ConstrainedSft(beta=2.0))
    long, _, again = gradient(tiny, ConstrainedSft(beta=2.0), length=80, rows=3)
    assert float(again["loss_start"]) == pytest.approx(float(metrics["loss_start"]), rel=1e-5)
    assert_close(long, short)


def test_no_second_base(tiny):  # noqa: F811
    """π_0 is the starting adapter on the same base: two adapters and a batch."""
    assert 2 < beside_the_base(tiny, ConstrainedSft()) < 3


def test_bfloat16_is_finite(tmp_path):
    """From a fresh adapter, with tokens that are certain and tokens that are not; the weights stay within (0, 2)."""
    model = load(write_model(tmp_path / "base"), dtype="bfloat16")
    texts = [Example.answering(np.arange(n, dtype=np.int32) % 40, 2) for n in (40, 9, 30, 5)]
    given = {"user": Stream("user", texts, 4, 0, False, (48,))}
    params = lora.init(model, 2, 4, ("q", "up"), key=KEY)
    found = finetune(model, params, ConstrainedSft(beta=50.0), given, optimizer=make_optimizer(0.3), steps=4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.params)) and found.compilations == 1
    ends = token_weight(jnp.asarray(1e3), jnp.asarray([0.0, 1e4]), jnp.asarray([1e4, 0.0]))
    np.testing.assert_allclose(ends, [2, LEAST])


@pytest.mark.parametrize("key", ["beta", "first_factor", "early_factor", "early_tokens"])
@pytest.mark.parametrize("bad", [-1, float("nan")])
def test_impossible_values_name_the_key(key, bad):
    if key == "early_tokens" and bad != bad:
        return
    with pytest.raises(InputError, match=rf"config\.defence\.{key} = "):
        ConstrainedSft(**{key: bad})
