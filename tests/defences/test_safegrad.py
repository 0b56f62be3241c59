"""SafeGrad: what the projection leaves, its limits, padding, memory, bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.config import get_config
from panacea_jax.data.batches import Stream, pad
from panacea_jax.data.encode import Example
from panacea_jax.defences import Loss, SafeGrad, Sft
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import load
from panacea_jax.parallel import make_mesh
from panacea_jax.perturbation import inner
from panacea_jax.planning.abstract_step import abstract_step, resident, tree_bytes
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests.planning.test_plan import TINY
from tests.tiny import write_model

KEY = jax.random.key(0)
USER = [Example.answering(np.arange(3, 3 + n, dtype=np.int32), 2) for n in (9, 6)]
SAFE = [Example.answering(np.arange(30, 30 - n, -1, dtype=np.int32), 3) for n in (8, 12)]
SILENT = [Example.answering(example.tokens, len(example.tokens)) for example in SAFE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def tiny(folder):
    """A loss, and a starting adapter whose B is not 0."""
    model = load(folder, dtype="float32")
    start = lora.init(model, 2, 4, ("q", "up"), key=KEY)
    return Loss.of(model), jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), start)


def gradient(tiny, defence, w, safe=SAFE, length=16, rows=2):
    loss, start = tiny
    batches = {"user": pad(USER, 16, 2), "alignment": pad(safe, length, rows)}
    batches = jax.tree.map(jnp.asarray, batches)
    step = jax.jit(lambda loss, w, start: defence.gradient(loss, w, batches, defence.init(start), KEY))
    grads, _, metrics = step(loss, w, start)
    return grads, metrics


def moved(tiny, by):
    """From the start along the task's gradient; the divergence then grows along the way gone."""
    g, _ = gradient(tiny, Sft(), tiny[1])
    return jax.tree.map(lambda w, g: w + by * g, tiny[1], g)


def difference(a, b):
    return jax.tree.map(jnp.subtract, a, b)


def length(tree):
    return float(jnp.sqrt(inner(tree, tree)))


def test_the_conflicting_part_is_gone_and_nothing_else(tiny):
    """After a step down the task's loss the gradients conflict: what is left is orthogonal to g_a, and what was taken lies along it."""
    w = moved(tiny, -0.5)
    plain, _ = gradient(tiny, Sft(), w)
    left, metrics = gradient(tiny, SafeGrad(rho=0.0), w)
    pulled, _ = gradient(tiny, SafeGrad(rho=1.0), w)
    a = difference(pulled, left)
    assert float(metrics["conflict"]) == 1 and float(metrics["cosine"]) < -0.01
    assert float(metrics["cosine"]) == pytest.approx(float(inner(plain, a)) / length(plain) / length(a), rel=1e-3)
    assert abs(float(inner(left, a))) < 1e-5 * length(plain) * length(a)
    taken = difference(plain, left)
    assert abs(float(inner(taken, a))) == pytest.approx(length(taken) * length(a), rel=1e-4)


def test_without_conflict_nothing_is_taken(tiny):
    """After a step up the task's loss, the way back is what alignment wants too."""
    w = moved(tiny, 0.5)
    left, metrics = gradient(tiny, SafeGrad(rho=0.0), w)
    assert float(metrics["conflict"]) == 0 and float(metrics["cosine"]) > 0.01
    assert length(difference(left, gradient(tiny, Sft(), w)[0])) < 1e-6 * length(left)


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_at_the_start_it_is_sft(tiny, rho):
    """Where the divergence has its minimum its gradient is rounding: nothing is projected off it, and none of it added."""
    found, metrics = gradient(tiny, SafeGrad(rho=rho), tiny[1])
    plain, _ = gradient(tiny, Sft(), tiny[1])
    assert float(metrics["kl"]) == pytest.approx(0, abs=1e-6) and float(metrics["conflict"]) == 0
    assert length(difference(found, plain)) < 1e-6 * length(plain)


def test_alignment_records_without_an_answer_leave_sft(tiny):
    w = moved(tiny, -0.5)
    found, metrics = gradient(tiny, SafeGrad(), w, SILENT)
    assert float(metrics["kl"]) == 0 == float(metrics["cosine"])
    assert length(difference(found, gradient(tiny, Sft(), w)[0])) < 1e-6 * length(found)


def test_padding_has_no_part(tiny):
    """Longer rows and a row without tokens change nothing; in the public code ρ would mean more."""
    w = moved(tiny, -5.0)
    short, metrics = gradient(tiny, SafeGrad(rho=2.0), w)
    long, again = gradient(tiny, SafeGrad(rho=2.0), w, length=24, rows=3)
    assert float(again["kl"]) == pytest.approx(float(metrics["kl"]), rel=1e-4) and metrics["conflict"] == 1
    assert length(difference(long, short)) < 1e-4 * length(short)


def test_bfloat16_stays_finite(folder):
    model = load(folder, dtype="bfloat16")
    params = lora.init(model, 2, 4, ("q", "up"), key=KEY)
    streams = {"user": Stream("user", USER, 2, 0, False, (16,)), "alignment": Stream("alignment", SAFE, 2, 0, False, (16,))}
    result = finetune(model, params, SafeGrad(), streams, optimizer=make_optimizer(1e-2), steps=4)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(result.params))
    assert result.compilations == 1


def test_it_keeps_one_adapter_more():
    """Nothing else stays between steps."""
    config = get_config()
    config.defence.name, config.lora.rank, config.data.max_length = "safegrad", 2, 16
    step = abstract_step(config, config_from_dict(TINY), make_mesh(devices=jax.devices()[:1]))
    assert resident(step.state, step.weights)["defence"] == tree_bytes(step.state.params) > 0


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_impossible_values_name_the_key(bad):
    with pytest.raises(InputError, match=r"config\.defence\.rho"):
        SafeGrad(rho=bad)
