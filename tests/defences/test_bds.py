"""BDS: which records weigh what, its limits, what it says of records, memory, bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from panacea_jax.config import get_config, make_defence
from panacea_jax.data.batches import Stream
from panacea_jax.data.encode import Example
from panacea_jax.defences import Bds, Loss, Vlguard
from panacea_jax.defences.bds import NAMED
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import load
from panacea_jax.parallel import make_mesh
from panacea_jax.planning.abstract_step import abstract_step, resident
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests.planning.test_plan import TINY
from tests.tiny import write_model
from tests.train.test_packing import difference

KEY = jax.random.key(0)


def records(seed, n, answer=None):
    """Answers of one length, or of 1 to 9 tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 10, n) if answer is None else [answer] * n
    return [Example.answering(rng.integers(0, 40, 3 + k).astype(np.int32), 3) for k in lengths]


def streams(user, batch_size=4, row_multiple=1, **more):
    given = {"user": user, "alignment": records(9, 8)}
    return {
        name: Stream(name, examples, batch_size, 0, True, (16,), row_multiple=row_multiple, **more)
        for name, examples in given.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, dtype="float32")


def adapter(model):
    made = lora.init(model, 2, 4, ("q", "up"), key=KEY)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), made)


def losses_of(model, params, examples):
    """By itself each, as nothing of BDS computes it."""
    loss = jax.jit(lambda loss, params, batch: loss(params, batch))
    alone = Stream("alone", examples, 1, 0, False, (16,))
    return np.asarray([loss(Loss.of(model), params, jax.tree.map(jnp.asarray, b)) for b in alone.once()])


def first_step(model, params, defence, given):
    """Gradient, state and metrics of step 0."""
    defence = defence.for_records(len(given["user"].examples))
    given = given | {"user": given["user"].numbered()}
    batches = {name: jax.tree.map(jnp.asarray, stream.batch(0)) for name, stream in given.items()}
    step = jax.jit(lambda loss, params: defence.gradient(loss, params, batches, defence.init(params), KEY))
    return step(Loss.of(model), params)


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
def test_without_a_rate_it_adds_the_alignment_loss(model, weighting):
    """All weights stay 1; of answers of one length the mean over records is that over tokens, so it is VLGuard's sum with λ = 1."""
    given = streams(records(1, 11, answer=5))
    given["alignment"] = dataclasses.replace(given["alignment"], examples=records(9, 8, answer=6))
    outcomes = [
        finetune(model, adapter(model), defence, given, optimizer=make_optimizer(1e-3), steps=4)
        for defence in (Bds(logit_rate=0.0, weighting=weighting), Vlguard(mode="sum", lam=1.0))
    ]
    assert difference(outcomes[0].params, outcomes[1].params) < 1e-5
    np.testing.assert_array_equal(outcomes[0].state.logits, np.zeros(11))


@pytest.mark.parametrize("size", [4, 7])
def test_losses_are_means_over_records_of_means_over_tokens(model, size):
    """Whatever rows fill up the batch; of 5 records and batches of 7 two are there twice, and count twice."""
    params, given = adapter(model), streams(records(2, 5), size, row_multiple=3)
    _, _, metrics = first_step(model, params, Bds(), given)
    for name, metric in (("user", "weighted_loss"), ("alignment", "alignment_loss")):
        each = losses_of(model, params, given[name].examples)
        [taken] = given[name].numbers(0)
        assert float(metrics[metric]) == pytest.approx(each[taken].mean(), rel=1e-5)
    [taken] = given["user"].numbers(0)
    tokens = np.asarray([given["user"].examples[i].loss_mask.sum() for i in taken])
    each = losses_of(model, params, [given["user"].examples[i] for i in taken])
    assert float(metrics["loss"]) == pytest.approx((each * tokens).sum() / tokens.sum(), rel=1e-5)


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
def test_the_first_step_of_the_logits_goes_down_the_weighted_loss(model, weighting):
    """Adam's first step is ± the rate: down for records of the batch, and by softmax up for all others, which gain what those lose."""
    params, given = adapter(model), streams(records(3, 9))
    _, state, _ = first_step(model, params, Bds(logit_rate=0.01, weighting=weighting), given)
    expected = np.full(9, 0.01 if weighting == "softmax" else 0.0)
    expected[given["user"].numbers(0)[0]] = -0.01
    np.testing.assert_allclose(state.logits, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
def test_records_of_higher_loss_end_with_less_weight(model, weighting):
    """The model stands still, so every record has one loss throughout; twenty epochs."""
    params, user = adapter(model), records(4, 12)
    defence = Bds(logit_rate=0.02, weighting=weighting)
    result = finetune(model, params, defence, streams(user), optimizer=optax.set_to_zero(), steps=60)
    weights = np.asarray(defence.record_weights(result.state))
    each = losses_of(model, params, user)
    if weighting == "softmax":
        assert weights.mean() == pytest.approx(1, rel=1e-5)
        ranks = [np.argsort(np.argsort(x)) for x in (weights, each)]
        correlation = np.corrcoef(*ranks)[0, 1]
        print(f"rank correlation of weights and losses {correlation:.2f}")
        assert correlation < -0.8
    else:
        assert (weights < 1).all()


def test_a_record_without_an_answer_harms_nothing(model):
    silent = Example.answering(np.arange(5, dtype=np.int32), 5)
    given = streams([silent, *records(5, 3)])
    grads, state, metrics = first_step(model, adapter(model), Bds(), given)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((grads, state, metrics)))


def test_bfloat16_stays_finite(folder):
    model = load(folder, dtype="bfloat16")
    result = finetune(model, adapter(model), Bds(), streams(records(6, 9)), optimizer=make_optimizer(1e-2), steps=4)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((result.params, result.state)))
    assert result.state.logits.dtype == jnp.float32 and result.compilations == 1


def test_it_keeps_three_numbers_a_record():
    """And how many steps were taken."""
    config = get_config()
    config.defence.name, config.lora.rank, config.data.max_length = "bds", 2, 16
    config.data.num_examples = 500
    step = abstract_step(config, config_from_dict(TINY), make_mesh(devices=jax.devices()[:1]))
    assert resident(step.state, step.weights)["defence"] == 3 * 500 * 4 + 4


def test_suspects_are_named_by_number():
    """From 1, those of least weight first, and no more than a manifest bears."""
    defence = Bds(weighting="sigmoid").for_records(5)
    state = defence.init(jnp.zeros(1))
    assert defence.report(None, state) == {"suspected": 0, "suspected_records": []}
    state = state._replace(logits=jnp.asarray([0.0, -2.0, 1.0, -5.0, -1.0]))
    assert defence.report(None, state) == {"suspected": 2, "suspected_records": [4, 2]}
    many = defence.init(jnp.zeros(1))._replace(logits=-2 - jnp.arange(300) / 10)
    found = defence.report(None, many)
    assert found["suspected"] == 300 and found["suspected_records"] == list(range(300, 300 - NAMED, -1))


def test_it_must_be_told_of_the_records(model):
    given = streams(records(7, 4))
    batches = {name: jax.tree.map(jnp.asarray, stream.batch(0)) for name, stream in given.items()}
    defence, params = Bds(), adapter(model)
    with pytest.raises(ValueError, match="for_records"):
        defence.gradient(Loss.of(model), params, batches, defence.init(params), KEY)


@pytest.mark.parametrize(("key", "bad"), [("logit_rate", -1.0), ("logit_rate", float("nan")), ("weighting", "linear")])
def test_impossible_values_name_the_key(key, bad):
    config = get_config()
    config.defence.name, config.defence[key] = "bds", bad
    with pytest.raises(InputError, match=rf"config\.defence\.{key}"):
        make_defence(config.defence)
