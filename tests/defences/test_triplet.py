"""Triplet: five steps equal PyTorch's, its parts by hand, its limit, runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.config import get_config, make_defence
from panacea_jax.data.batches import Stream
from panacea_jax.defences import Loss, Sft, Triplet
from panacea_jax.defences.protocol import Anchor
from panacea_jax.defences.triplet import centres, cosine_distance, distance, hinges, rounding_of
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests.defences.five_steps import (
    BATCH,
    STEPS,
    assert_equal_tensors,
    examples,
    run,
    setting,
    start_tensors,
    torch_model,
    torch_steps,
    wide_setting,
)
from tests.defences.five_steps import streams as two_streams
from tests.defences.oracles import triplet as oracle
from tests.on_devices import on_devices
from tests.tiny import write_model
from tests.train.test_loop import assert_equal

__all__ = ["setting", "wide_setting"]  # fixtures

# The benign margin is small, so that some hinges are at rest.
WEIGHTS = {"alpha": 0.5, "beta": 0.6, "lam": 0.05, "refusal": 0.3}
MARGINS = (0.6, 3.0)


def streams():
    return two_streams() | {"benign": Stream("benign", examples(3), BATCH, 0, False, (26,))}


def compare(setting, full):
    given, theirs, active = streams(), torch_model(setting, full), []
    defence = Triplet(**WEIGHTS, margin_benign=MARGINS[0], margin_harmful=MARGINS[1])
    out, ours = run(setting, defence, given, full)
    assert out.compilations == 1
    # Of three layers round(0.625 · 3) to round(0.9375 · 3).
    by_step = oracle.gradients(theirs, given, STEPS, **WEIGHTS, margins=MARGINS, layers=(2, 3), active=active)
    torch_steps(theirs, lambda step: next(by_step))
    assert_equal_tensors(ours, theirs, start_tensors(setting, full), setting[3])
    assert min(active) > 0.05 and max(active) < 0.95, active


def test_five_steps(setting):
    compare(setting, full=False)


def test_five_steps_of_all_parameters(wide_setting):
    compare(wide_setting, full=True)


def test_its_limit_is_sft_and_each_term_counts(wide_setting):
    """At the start and away from it."""
    model, adapter, _, _ = wide_setting
    loss, key = Loss.of(model), jax.random.key(0)
    batches = {n: jax.tree.map(jnp.asarray, s.batch(0)) for n, s in streams().items()}
    start = jax.tree.map(lambda x: x + 0.01, adapter)

    def gradient(defence):
        @jax.jit
        def found(loss, w, state):
            grads, _, metrics = defence.gradient(loss, w, batches, state, key)
            return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(grads)]), metrics

        return lambda state: found(loss, adapter, state)

    nothing = {"alpha": 0.0, "beta": 0.0, "lam": 0.0}
    plain, _ = gradient(Sft())(())
    found, metrics = gradient(Triplet(**nothing, refusal=1.0))(Anchor(start))
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-14)
    assert set(metrics) == {"loss", "benign_hinge", "harmful_hinge", "refusal_loss"}
    assert not gradient(Triplet(**nothing))(Anchor(start))[0].any()
    alone = {term: gradient(Triplet(**nothing | {term: 1.0})) for term in ("alpha", "beta", "lam")}
    for found in alone.values():
        assert np.linalg.norm(found(Anchor(start))[0]) > 1e-3
    # At the start nothing diverges, and no state has a direction away from itself.
    found, metrics = alone["lam"](Anchor(adapter))
    assert np.linalg.norm(found) < 1e-12 and float(metrics["kl"]) < 1e-12
    still, moved = (np.linalg.norm(alone["alpha"](Anchor(at))[0]) for at in (adapter, start))
    assert 0 < still < moved


def test_distances_by_hand():
    h, start = jnp.asarray([[3.0, 4.0], [1.0, 2.0], [0.0, 0.0]]), jnp.asarray([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    value, gradient = jax.vmap(jax.value_and_grad(lambda h, s: distance(h, s, 1e-6)))(h, start)
    np.testing.assert_allclose(value, [5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(gradient, [[0.6, 0.8], [0, 0], [0, 0]], atol=1e-6)
    # A difference of a rounding has no direction, one of many has.
    near = start[1] * (1 + jnp.asarray([1e-7, 1e-3]))
    of = jax.grad(lambda h: distance(h, start[1], rounding_of(jnp.float32)))
    assert np.linalg.norm(of(near)) == pytest.approx(1, rel=1e-5) and not of(start[1] * (1 + 1e-7)).any()
    assert rounding_of(jnp.bfloat16) == 2.0**-7 and rounding_of(jnp.float32) == 2.0**-18
    u = jnp.asarray([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    v = jnp.asarray([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(cosine_distance(u, v), [0, 1, 2, 1], atol=1e-6)
    assert np.isfinite(jax.grad(lambda u: cosine_distance(u, v).sum())(u)).all()


@pytest.mark.parametrize("benign", [True, False])
def test_only_the_tokens_asked_for_count(benign):
    states, start = jax.random.normal(jax.random.key(0), (2, 3, 2, 5, 4))
    tokens = jnp.asarray([[False, True, True, False, False], [False, False, True, True, True]])
    centre = centres(states, tokens)
    np.testing.assert_allclose(centre, np.asarray(states)[:, np.asarray(tokens)].mean(1), rtol=1e-5)
    value = hinges(states, start, centre, tokens, 1.0, benign)
    other = jnp.where(tokens[..., None], states, 7.0)
    np.testing.assert_array_equal(centres(other, tokens), centre)
    assert float(hinges(other, start, centre, tokens, 1.0, benign)) == float(value)
    total = 0.0
    for l in range(3):
        for b, t in np.argwhere(np.asarray(tokens)):
            h, h0, c = (np.asarray(x, float) for x in (states[l, b, t], start[l, b, t], centre[l]))
            to_centre, to_start = (1 - h @ y / np.linalg.norm(h) / np.linalg.norm(y) for y in (c, h0))
            apart = np.linalg.norm(h - h0) - to_centre if benign else to_centre - to_start
            total += max(apart + 1.0, 0)
    assert float(value) == pytest.approx(total, rel=1e-5)


def test_layers_by_share_of_the_depth():
    """The published ones are states 20 to 30 of Llama 3 8B."""
    assert Triplet()._layers(32) == slice(20, 31)
    assert Triplet()._layers(2) == slice(1, 3) and Triplet()._layers(1) == slice(1, 2)
    assert Triplet(depth=(0.0, 1.0))._layers(4) == slice(0, 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("tiny") / "base"), dtype="float32")


def train(model, steps, checkpoints=None, dropout=0.0):
    given = {
        name: Stream(name, examples(seed, vocab=40), 3, 0, True, (28,))
        for seed, name in enumerate(("user", "harmful", "benign"))
    }
    adapter = lora.init(model, 2, 4, ("q", "up"), key=jax.random.key(0), dropout=dropout)
    return finetune(
        model, adapter, Triplet(), given, optimizer=make_optimizer(1e-2), steps=steps, checkpoints=checkpoints
    )


def test_stop_and_resume_is_bit_for_bit(model, tmp_path):
    """The start too, which a resumed run does not make anew."""
    whole = train(model, 6)
    assert train(model, 3, Checkpoints(tmp_path / "c")).steps == 3
    resumed = train(model, 6, Checkpoints(tmp_path / "c"))
    assert_equal((whole.params, whole.state), (resumed.params, resumed.state))
    assert whole.compilations == resumed.compilations == 1


def test_bfloat16_is_finite(tmp_path):
    model = load(write_model(tmp_path / "base"), dtype="bfloat16")
    result = train(model, 2, dropout=0.1)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.params))


def test_eight_devices_train_what_one_does(tmp_path):
    found = on_devices("tests.defences.sharded_triplet", write_model(tmp_path / "base"))
    assert found["devices"] == 8
    for name in ("lora", "full"):
        error, moved = found[name]
        assert error < 1e-5 < 1e-3 < moved, found


@pytest.mark.parametrize(
    ("key", "bad"),
    [("alpha", -1.0), ("lam", float("nan")), ("margin_benign", -0.1), ("margin_harmful", float("inf")), ("refusal", -1.0),
     ("depth", (0.5,)), ("depth", (0.9, 0.5)), ("depth", (0.5, 1.5))],
)  # fmt: skip
def test_impossible_values_name_the_key(key, bad):
    section = get_config().align.defence
    section.name, section[key] = "triplet", bad
    with pytest.raises(InputError, match=rf"config\.align\.defence\.{key}"):
        make_defence(section, "align.")
