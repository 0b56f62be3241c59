"""Healing in memory: ``pj.heal``."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import panacea_jax as pj
from panacea_jax.defences import Antidote, Ascent, Panacea, Realign, SafeLora
from panacea_jax.errors import InputError
from panacea_jax.healing.sets import set_apart
from panacea_jax.healing.table import UNTREATED
from panacea_jax.healing.trial import method_name
from tests.healing.test_radius import records
from tests.tiny import write_model

SETTINGS = {"template": "chat", "max_length": 32, "new_tokens": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    model = pj.load(write_model(tmp_path_factory.mktemp("trial") / "base"), dtype="float32")
    adapter = pj.lora.init(model, 2, 4, ("q", "v"), key=jax.random.key(0))
    return model, jax.tree.map(lambda x: x + 0.1, adapter)


def test_methods_side_by_side(world, tmp_path, capsys):
    model, params = world
    methods = (Ascent(), Ascent(rho=0.3), Realign(steps=2), Antidote(dense_ratio=0.2), SafeLora())
    healed = pj.heal(
        model, params, records(1, 12), records(2, 12), benign=records(3, 12), refusals=records(4, 8, ("no",)),
        methods=methods, **SETTINGS,
    )  # fmt: skip
    rows = {row.method: row for row in healed.rows}
    assert list(rows)[:4] == [UNTREATED, "ascent", "ascent:rho=0.3", "realign:steps=2"]
    assert rows["safelora"].why == "needs an unaligned base" and rows["safelora"].figures is None
    assert {n: s.n for n, s in rows["ascent"].figures.items()} == {"hs": 3, "hs_plus": 3, "fa": 3, "benign": 3, "coherence": 9}
    assert rows["ascent:rho=0.3"].change == pytest.approx(0.3, rel=1e-4)
    first = next(row.change for row in healed.rows if row.method.startswith("ascent") and row.change > 0)
    [noise] = [row.change for row in healed.rows if row.method.startswith("random_perturbation")]
    assert noise == pytest.approx(first, rel=1e-4)
    assert rows["ascent"].change == pytest.approx(healed.radii["ascent"].radius, abs=1e-5)
    deployed = float(optax.tree.norm(jax.tree.map(jnp.subtract, healed.result.deployed, params)))
    assert deployed == pytest.approx(healed.best.change, rel=1e-5)
    healed.show()
    out = capsys.readouterr().out
    assert "left out: needs an unaligned base" in out and "held-out records" in out
    pj.export_adapter(healed.result, tmp_path / "adapter")
    again = pj.lora.load(tmp_path / "adapter", model)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(healed.result.deployed)):
        np.testing.assert_array_equal(x, y)


def test_harmful_records_alone(world):
    """The default methods, of which realignment has no data, and nothing but the harmful loss to find the range by."""
    model, params = world
    healed = pj.heal(model, params, records(1, 8), **SETTINGS)
    rows = {row.method: row for row in healed.rows}
    assert rows["realign:steps=50"].why == "needs refusals and benign records"
    assert {"ascent", "ascent:steps=8", "antidote"} <= set(rows)
    assert set(rows["ascent"].figures) == {"hs", "hs_plus", "coherence"}
    assert healed.data.startswith("With harmful records there are ascent")


def test_records_that_are_all_held_out_leave_a_method_out(world):
    """Refusals to the very prompts that are held out."""
    model, params = world
    harmful = records(1, 8)
    refusals = [dataclasses.replace(r, output="no") for r in set_apart(harmful, 0.25, 64, "held_out")]
    healed = pj.heal(
        model, params, harmful, benign=records(3, 8), refusals=refusals, methods=(Realign(steps=1), Antidote()), **SETTINGS
    )
    rows = {row.method: row for row in healed.rows}
    assert rows["realign:steps=1"].why == "all of the refusals ask what held-out ones do"
    assert rows["antidote"].figures is not None


def test_a_method_in_a_line():
    assert method_name(Ascent(rho=2, keep=("user",), steps=3)) == "ascent:rho=2,steps=3,keep=('user',)"
    assert method_name(Realign()) == "realign"


def test_what_is_refused(world):
    model, params = world
    with pytest.raises(InputError, match="panacea acts at the stage finetune"):
        pj.heal(model, params, records(1, 8), methods=(Panacea(),), **SETTINGS)
    with pytest.raises(InputError, match="no harmful prompts"):
        pj.heal(model, params, [], records(1, 8), **SETTINGS)
    with pytest.raises(InputError, match="leaves none of 1 records"):
        pj.heal(model, params, records(1, 1), **SETTINGS)
