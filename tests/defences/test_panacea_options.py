"""Panacea's schedules, layers and variants on losses whose answer is known, and their costs; each against the same in numpy."""

import dataclasses
import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.defences import Loss, Panacea, Sft
from panacea_jax.defences.loss import mean_gradient
from panacea_jax.errors import InputError
from panacea_jax.export import load_epsilon
from panacea_jax.perturbation import norms
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from panacea_jax.train.signals import Preempted
from tests.defences.test_panacea import (
    BATCHES,
    CURVES,
    KEY,
    W,
    flat,
    gradient_by_hand,
    loss,
    run,
)
from tests.runs import RHO, make_place, panacea
from tests.train.test_loop import assert_equal, examples, model, streams
from tests.train.test_loop import run as train
from tests.train.test_loop import start as begin

__all__ = ["model"]  # a fixture

PLAIN = {"rho": 0.3, "lam": 0.7, "clamp": "none"}
MORE = BATCHES | {"benign": jnp.asarray(0.9), "alignment": jnp.asarray(-1.3)}
X = np.asarray(W["x"], float)


def path(defence, batches=BATCHES, steps=6):
    """By step: where it stands, the gradient there, ε after it, metrics; w moves by a fixed amount."""
    defence = defence.for_steps(steps)
    state, found = defence.init(W), []
    for step in range(steps):
        w = jax.tree.map(lambda x, by=0.1 * step: x + by, W)
        grads, state, metrics = run(defence, batches, w, state)
        found.append((w, flat(grads), flat(state.epsilon), metrics))
    return found


def fresh(w, batches=BATCHES):
    """The paper's gradient there."""
    return flat(run(Panacea(**PLAIN), batches, w)[0])


def sft(w):
    return flat(run(Sft(), w=w)[0])


# ---- schedules


def test_plain_sft_until_the_defence_begins():
    seen = path(Panacea(start=0.5, **PLAIN))
    for w, grads, epsilon, metrics in seen[:3]:
        np.testing.assert_array_equal(grads, sft(w))
        assert not epsilon.any() and np.isnan(metrics["term_ratio"]) and np.isnan(metrics["harmful_loss"])
    for w, grads, epsilon, metrics in seen[3:]:
        np.testing.assert_allclose(grads, fresh(w), rtol=1e-5)
        assert np.linalg.norm(epsilon) == pytest.approx(0.3, rel=1e-5) and metrics["term_ratio"] > 0


def test_late_and_every_second_step():
    """The first step of the defence refreshes; the mean ε is that of the refreshed ones."""
    defence = Panacea(start=0.5, every=2, **PLAIN)
    seen = path(defence)
    np.testing.assert_allclose(seen[3][1], fresh(seen[3][0]), rtol=1e-5)
    held = sft(seen[3][0]) - seen[3][1]
    np.testing.assert_allclose(seen[4][1], sft(seen[4][0]) - held, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen[5][1], fresh(seen[5][0]), rtol=1e-5)


def test_skipped_steps_are_sft_and_the_others_k_times_as_strong():
    for w, grads, _, metrics in path(Panacea(every=3, between="skip", **PLAIN)):
        due = not np.isnan(metrics["cos_gh"])
        expected = sft(w) - 3 * (sft(w) - fresh(w)) if due else sft(w)
        np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-5)
        assert due != bool(np.isnan(metrics["term_ratio"]))


def test_nothing_is_held_that_is_not_reused():
    assert jax.tree.leaves(Panacea(every=2).init(W).difference)
    for defence in (Panacea(every=2, between="skip"), Panacea(start=0.5), Panacea()):
        assert not jax.tree.leaves(defence.init(W).difference)


@pytest.mark.parametrize(
    ("given", "harmful", "others"),
    [
        ({}, (2.0, 0.0), {}),
        ({"start": 0.75, "every": 2}, (0.25, 0.0), {}),
        ({"start": 0.5, "ascent_steps": 2, "final_epsilon": "mean"}, (1.5, 2.0), {}),
        ({"rho": "auto", "final_epsilon": "mean"}, (2.0, 1.5), {}),
        ({"rho_per_layer": "top:1", "ceiling": 1.0}, (2.0, 1.5), {}),
        ({"rho_per_layer": "uniform"}, (2.0, 0.0), {}),
        ({"trusted": ("benign", "alignment"), "start": 0.5}, (1.0, 0.0), {"benign": (0.5, 0.0), "alignment": (0.5, 0.0)}),
        ({"off": ("user", "benign"), "every": 4}, (0.5, 0.0), {"benign": (0.25, 0.0)}),
        ({"off": ("benign",), "trusted": ("benign",), "final_epsilon": "mean"}, (2.0, 1.0), {"benign": (2.0, 1.0)}),
    ],
)
def test_what_it_costs(given, harmful, others):
    streams = Panacea(**given).streams
    assert {name: (s.passes, s.whole_passes) for name, s in streams.items()} == {"harmful": harmful} | others


def test_it_makes_the_passes_that_it_states():
    """Forward and backward passes of a run, counted as they are made."""
    made = []

    def counted(w, batch):
        # Called back at each evaluation, of a branch only when it is taken.
        jax.debug.callback(lambda: made.append(0))
        return loss(w, batch)

    steps = 4
    late = {"start": 0.5, "every": 2, "trusted": ("benign",), "off": ("benign",)}
    for given in ({"start": 0.5}, {"every": 2, "between": "skip"}, late):
        defence = Panacea(**PLAIN, **given).for_steps(steps)
        step = jax.jit(lambda state, defence=defence: defence.gradient(counted, W, MORE, state, KEY)[1])
        state = defence.init(W)
        made.clear()
        for _ in range(steps):
            state = step(state)
        jax.effects_barrier()
        stated = 1 + sum(s.passes for s in defence.streams.values())
        assert len(made) == stated * steps, given


# ---- trusted rows at w + ε


@pytest.mark.parametrize("trusted", [("benign",), ("benign", "alignment")])
def test_trusted_rows_are_learnt_where_the_model_is_deployed(trusted):
    grads, state, metrics = run(Panacea(trusted=trusted, trust=0.4, **PLAIN), MORE)
    at = X + flat(state.epsilon)[:3]
    pull = sum(gradient_by_hand(at, float(MORE[name])) for name in trusted)
    np.testing.assert_allclose(flat(grads), fresh(W) + 0.4 * pull, rtol=1e-5)
    w = jax.tree.map(jnp.add, W, state.epsilon)
    assert float(metrics["trusted_loss"]) == pytest.approx(sum(float(loss(w, MORE[n])) for n in trusted), rel=1e-5)


def test_no_trusted_rows_before_the_defence_begins():
    seen = path(Panacea(trusted=("benign",), start=0.5, **PLAIN), MORE)
    for w, grads, *_ in seen[:3]:
        np.testing.assert_array_equal(grads, sft(w))
    assert np.linalg.norm(seen[3][1] - fresh(seen[3][0])) > 0.1


# ---- ε off other gradients


RNG = np.random.default_rng(5)
APART = {name: jnp.asarray(RNG.normal(size=5), jnp.float32) for name in ("user", "harmful", "benign", "alignment")}


def apart(w, batch):
    """As ``loss``, with targets of its own for each entry, so that gradients of several batches are independent."""
    return 0.5 * jnp.sum(CURVES * (w["x"] - batch[:3]) ** 2) + jnp.sum(w["y"] * batch[3:])


def slope(name):
    target = np.asarray(APART[name])
    return np.concatenate([np.asarray(CURVES) * (X - target[:3]), target[3:]])


@pytest.mark.parametrize("off", [("user",), ("benign", "alignment"), ("user", "benign")])
def test_epsilon_is_orthogonal_to_what_it_is_kept_off(off):
    """ε has length ρ along what least squares leave of h; the other losses do not change to first order."""
    defence = Panacea(off=off, **PLAIN)
    _, state, metrics = defence.gradient(apart, W, APART, defence.init(W), KEY)
    h = slope("harmful")
    others = np.stack([slope(name) for name in off], axis=1)
    rest = h - others @ np.linalg.lstsq(others, h, rcond=None)[0]
    epsilon = flat(state.epsilon)
    np.testing.assert_allclose(epsilon, 0.3 * rest / np.linalg.norm(rest), rtol=1e-4, atol=1e-6)
    assert np.abs(epsilon @ others).max() < 1e-5 and np.abs(h @ others).max() > 0.1
    assert metrics["harmful_loss_perturbed"] > metrics["harmful_loss"]


def test_further_ascent_steps_stay_off_too():
    defence = Panacea(off=("benign",), ascent_steps=3, **PLAIN)
    _, state, _ = defence.gradient(apart, W, APART, defence.init(W), KEY)
    epsilon = flat(state.epsilon)
    assert abs(epsilon @ slope("benign")) < 1e-5
    assert np.linalg.norm(epsilon) <= 0.3 * (1 + 1e-6)


STACKED = {"a": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32), "b": jnp.asarray(RNG.normal(size=(3, 2, 2)), jnp.float32)}
TARGETS = {n: jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), x.dtype), STACKED) for n in ("user", "harmful", "benign")}


def by_layer(w, batch):
    return sum(jnp.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(w), jax.tree.leaves(batch))) / 2


def cosine(x, y):
    return flat(x) @ flat(y) / np.linalg.norm(flat(x)) / np.linalg.norm(flat(y))


@pytest.mark.parametrize("given", [{"rho": (0.1, 0.2, 0.5)}, {"rho": 0.3, "rho_per_layer": (1.0, 0.0, 3.0), "ascent_steps": 3}], ids=str)
def test_with_a_radius_for_each_layer_epsilon_is_orthogonal_too(given):
    """Layers are scaled differently, so it has to be so in each."""
    defence = Panacea(off=("benign",), lam=0.1, clamp="none", **given)
    _, state, _ = defence.gradient(by_layer, STACKED, TARGETS, defence.init(STACKED), KEY)
    assert abs(cosine(state.epsilon, jax.grad(by_layer)(STACKED, TARGETS["benign"]))) < 1e-6
    radii = given["rho"] if isinstance(given["rho"], tuple) else 0.3 * np.asarray([1, 0, 3]) / 10**0.5
    np.testing.assert_allclose(norms(state.epsilon, per_layer=True), radii, rtol=1e-5)


def test_so_is_the_epsilon_of_the_whole_set(model):
    """Radii 1 : 4; the benign set is passed over once at the end."""
    benign = dataclasses.replace(streams()["harmful"], name="benign", examples=examples(7))
    defence = Panacea(rho=(0.1, 0.4), lam=0.1, off=("benign",), final_epsilon="mean")
    params = jax.tree.map(lambda x: x + 0.02, begin(model, False)[1])
    result = finetune(model, params, defence, streams() | {"benign": benign}, optimizer=make_optimizer(1e-2), steps=2)
    slope = mean_gradient(Loss.of(model), result.params, map(functools.partial(jax.tree.map, jnp.asarray), benign.once()))
    np.testing.assert_allclose(norms(result.epsilon, per_layer=True), [0.1, 0.4], rtol=1e-5)
    assert abs(cosine(result.epsilon, slope)) < 1e-5


# ---- layers, and all of it in the loop


@pytest.mark.parametrize(
    ("given", "total"),
    [
        ({"rho": 0.5, "rho_per_layer": "inverse"}, 0.5),
        ({"rho": 0.5, "rho_per_layer": (0.0, 2.0)}, 0.5),
        ({"rho_relative": 0.1, "rho_per_layer": "top:1"}, None),
    ],
)
def test_radii_by_layer_in_training(model, given, total):
    """With the same total as one radius over all; of a probe by the gradient over the whole harmful set at the start."""
    result = train(model, defence=Panacea(lam=0.3, **given))
    found = np.asarray(norms(result.epsilon, per_layer=True))
    if total is None:
        way = jax.tree.map(jnp.subtract, result.params, begin(model, False)[1])
        total = 0.1 * float(norms(way))
        assert found.min() == 0 and np.linalg.norm(found) == pytest.approx(total, rel=0.2)  # of the step before
    else:
        assert np.linalg.norm(found) == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(np.asarray(result.state.layers), found / np.linalg.norm(found), atol=1e-5)
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def kill(_):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "defence",
    [
        Panacea(rho="auto", final_epsilon="mean", rho_per_layer="proportional", layer_seed=1),
        Panacea(rho=0.5, lam=0.3, start=0.5, every=2, off=("user",)),
    ],
)  # fmt: skip
def test_stop_and_resume_is_bit_for_bit(model, tmp_path, defence):
    """All that was measured stands in the state."""
    whole = train(model, defence=defence)
    with pytest.raises(Preempted):
        train(model, defence=defence, checkpoints=Checkpoints(tmp_path / "c"), on_compile=kill)
    resumed = train(model, defence=defence, checkpoints=Checkpoints(tmp_path / "c"))
    assert_equal((whole.params, whole.state), (resumed.params, resumed.state))
    assert whole.compilations <= 2
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(whole.deployed))


def test_a_radius_of_the_distance_moved_needs_passes_after_the_first_update():
    for given in ({"rho": "auto"}, {"rho_relative": 0.1}):
        with pytest.raises(InputError, match="config.defence.every = 4: of 4 steps"):
            Panacea(every=4, **given).for_steps(4)
        assert Panacea(every=3, **given).for_steps(4).every == 3
    assert Panacea(every=4).for_steps(4).every == 4


def test_a_start_without_a_number_of_steps():
    with pytest.raises(ValueError, match="for_steps"):
        run(Panacea(start=0.5))
    assert Panacea(start=0.5).for_steps(9)._first == 4
    assert Panacea().for_steps(9) == Panacea()  # so that runs of any length share a compiled step


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rho": (0.1, 0.2), "rho_per_layer": "uniform"}, "rho_per_layer = uniform: rho = \\(0.1, 0.2\\) is one radius a layer"),
        ({"rho": ("auto", 1.0)}, "config.defence.rho"),
        ({"rho": (0.1, 0.2), "rho_relative": 0.1}, "config.defence.rho_relative = 0.1 would take the place of rho"),
        ({"start": -0.1}, "config.defence.start"),
        ({"trusted": ("user",)}, "config.defence.trusted"),
        ({"trusted": ("benign", "benign")}, "config.defence.trusted = .*: 'benign' or 'alignment', each once"),
        ({"off": ("harmful",)}, "config.defence.off"),
        ({"trust": -1.0}, "config.defence.trust"),
        ({"layer_file": "x.json"}, "config.defence.layer_file"),
    ],
)
def test_impossible_values_name_the_key(given, said):
    with pytest.raises(InputError, match=said):
        Panacea(**given)


@pytest.mark.parametrize("rho", [(0.1,), (0.1, 0.2)])
def test_as_many_radii_as_layers(rho):
    with pytest.raises(InputError, match=rf"config\.defence\.rho = .*: {len(rho)} radii for 3 layers"):
        Panacea(rho=rho).init(STACKED)
    with pytest.raises(InputError, match=r"config\.defence\.rho: one radius a layer is for adapters"):
        Panacea(rho=rho).init(W)
    with pytest.raises(InputError, match=r"config\.defence\.rho = .*: one radius a layer is for adapters"):
        Panacea(rho=rho).check(full_parameters=True)


def test_radii_from_a_file_on_the_command_line(tmp_path, capsys):
    """A layer gets what the file gives it, and the file is among what the stage was made from. What does not fit the model's two layers is
    one line, and nothing is written."""
    place, file = make_place(tmp_path / "place"), tmp_path / "c.json"
    file.write_text("[1, 3]")
    for rule, said in (("(1,2,3)", "3 values in (1.0, 2.0, 3.0) for 2 layers"), ("top:3", "rho_per_layer = top:3: there are 2 layers")):
        assert panacea("finetune", *place.flags(f"--config.defence.rho_per_layer={rule}"), f"--workdir={tmp_path / 'bad'}") == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert said in lines[-1]
        assert not (tmp_path / "bad" / "finetune" / "manifest.json").exists()
    flags = place.flags(f"--config.defence.rho_per_layer={file}", "--config.train.steps=2")
    assert panacea("finetune", *flags, f"--workdir={tmp_path / 'run'}") == 0
    stage = tmp_path / "run" / "finetune"
    first, second = np.asarray(norms(load_epsilon(stage / "epsilon.safetensors"), per_layer=True))
    assert second == pytest.approx(3 * first, rel=1e-4) and np.hypot(first, second) == pytest.approx(RHO, rel=1e-4)
    assert str(file) in json.loads((stage / "manifest.json").read_text())["inputs"]


def test_files_are_looked_at_before_anything_is_loaded(tmp_path):
    file = tmp_path / "c.json"
    with pytest.raises(InputError, match="rho_per_layer = .*c.json: cannot be read .No such file"):
        Panacea(rho_per_layer=str(file)).check(False)
    file.write_text(json.dumps([1.0, 2.0]))
    Panacea(rho_per_layer=str(file)).check(False)
    with pytest.raises(InputError, match="of all weights some belong to no layer"):
        Panacea(rho_per_layer="uniform").check(True)
