"""RESTA equals NumPy, which adds whole matrices in float64; limits and what is refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from panacea_jax.config import get_config, make_defence
from panacea_jax.defences import Resta
from panacea_jax.errors import InputError
from panacea_jax.export import epsilon_tensors, save_model
from panacea_jax.healing.trial import changed
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.models.peft import adapter_tensors, save_adapter
from panacea_jax.train.once import apply_once
from tests import runs
from tests.defences.test_asft import other_than
from tests.defences.test_lox import products
from tests.defences.test_safelora import random_adapter, world

__all__ = ["world"]  # a fixture


def product(adapter):
    """s B A by module, in float64."""
    return products({n: x.astype(np.float64) for n, x in adapter_tensors(adapter).items()}, adapter.scale)


def healed(model, params, **settings):
    return apply_once(model, params, Resta(**settings), {}).deployed


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_an_adapter(world, tmp_path, gamma):
    """The alignment's adapter, and less one that was fine-tuned on harm, with other ranks, projections and layers."""
    base, _, alignment, adapter = world
    model = load(base, dtype="float32")
    key = jax.random.key(4)
    harmful = lora.init(model, 2, 3, ("q", "o"), key=key, layers="1")
    harmful = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), harmful)
    save_adapter(harmful, tmp_path / "harmful", str(base))
    w, good, bad = (product(a) for a in (adapter, lora.load(alignment, model), harmful))
    for settings, vector in (
        ({"base": str(base), "aligned": str(alignment)}, good),
        ({"base": str(tmp_path / "harmful")}, {n: -x for n, x in bad.items()}),
        ({"base": str(tmp_path / "harmful"), "aligned": str(alignment)},
         {n: good.get(n, 0) - bad.get(n, 0) for n in (*good, *bad)}),
    ):  # fmt: skip
        found = healed(model, adapter, gamma=gamma, **settings)
        ours = product(found)
        assert ours.keys() >= {*w, *vector} and found.scale == adapter.scale
        for name, x in ours.items():
            np.testing.assert_allclose(x, w.get(name, 0) + gamma * vector.get(name, 0), rtol=1e-5, atol=1e-6)
        # What healing says of how far it went: the factors that were added.
        assert (float(changed(found, adapter)) > 0.1) and found.rank > adapter.rank
    assert float(changed(adapter, adapter)) == 0


def test_the_adapter_is_one_for_peft(world, tmp_path):
    """Written and read again it is what it was, and merged it adds what it says."""
    base, _, alignment, adapter = world
    model = load(base, dtype="float32")
    found = healed(model, adapter, base=str(base), aligned=str(alignment), gamma=0.5)
    save_adapter(found, tmp_path / "healed", str(base))
    again = lora.load(tmp_path / "healed", model)
    save_model(model, again, tmp_path / "merged")
    new, old = (load_file(f / "model.safetensors") for f in (tmp_path / "merged", base))
    for name, x in product(found).items():
        key = f"{name.removeprefix('base_model.model.')}.weight"
        np.testing.assert_allclose(new[key], old[key] + x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.4])
def test_all_weights(world, tmp_path, gamma):
    """Every tensor, embedding, norms and head too."""
    base = world[0]
    rng = np.random.default_rng(3)
    folders = {}
    for name in ("tuned", "aligned", "before"):
        model = load(base, dtype="float32")
        noisy = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), model.weights)
        folders[name] = tmp_path / name
        save_model(model, noisy, folders[name])
    model, params = full_parameters(load(folders["tuned"], dtype="float32"))
    found = epsilon_tensors(healed(model, params, base=str(folders["before"]), aligned=str(folders["aligned"]), gamma=gamma))
    tuned, aligned, before = (load_file(folders[n] / "model.safetensors") for n in folders)
    assert found.keys() == tuned.keys()
    for name, w in tuned.items():
        wanted = w.astype(float) + gamma * (aligned[name].astype(float) - before[name])
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6)


def test_what_is_refused(world, tmp_path):
    base, aligned, alignment, adapter = world
    model = load(base, dtype="float32")

    def refused(text, params=adapter, m=model, **settings):
        with pytest.raises(InputError, match=text):
            apply_once(m, params, Resta(**settings), {})

    refused(r"config\.defence\.base is not set: RESTA needs")
    refused(r"config\.defence\.base = nowhere: .*no such model folder", base="nowhere")
    refused("is the aligned model; give the one before", base=str(base))
    refused("is not that of the adapter's base, so no adapter can hold", base=str(aligned), aligned=str(alignment))
    # the same matrices in another folder are the same base
    save_model(model, None, tmp_path / "copy")
    healed(model, adapter, base=str(tmp_path / "copy"), aligned=str(alignment))
    bare, params = full_parameters(model)
    refused("config.defence.aligned is not set", params, bare, base=str(base))
    refused("an adapter; all weights need a whole model", params, bare, base=str(alignment))
    refused("is the aligned model; give the one before", params, bare, base=str(base), aligned=str(base))
    refused(r"config\.defence\.aligned = nowhere", params, bare, base=str(base), aligned="nowhere")
    section = get_config().heal.defence
    section.name, section.gamma = "resta", -1.0
    with pytest.raises(InputError, match=r"config\.heal\.defence\.gamma"):
        make_defence(section, "heal.")


def test_a_work_directory_of_all_weights_knows_the_aligned_model(tmp_path):
    """It is what fine-tuning went on from; γ times what alignment changed comes on top."""
    place = runs.make_place(tmp_path / "place")
    before, old = other_than(place.base, tmp_path / "before")
    flags = place.flags(
        "--config.defence.name=sft", "--config.train.full_parameters=True", "--config.heal.train.full_parameters=True",
        "--config.heal.defence.name=resta", "--config.heal.defence.gamma=0.5", f"--config.heal.defence.base={before}",
        "--config.optimizer.learning_rate=1e-3", "--config.train.steps=2", "--config.eval.tasks=()", "--config.checkpoint.every=0",
    )  # fmt: skip
    workdir = tmp_path / "run"
    assert runs.panacea("run", *flags, f"--workdir={workdir}") == 0
    read = json.loads((workdir / "heal" / "manifest.json").read_text())
    assert read["config"]["defence"]["aligned"] == str(place.base) and {str(before), str(place.base)} <= set(read["inputs"])
    aligned, tuned, new = (
        load_file(f / "model.safetensors") for f in (place.base, *(workdir / s / "model" for s in ("finetune", "heal")))
    )
    for name, w in new.items():
        np.testing.assert_allclose(w, tuned[name] + 0.5 * (aligned[name] - old[name]), rtol=1e-5, atol=1e-6)
    assert max(np.abs(new[n] - tuned[n]).max() for n in new) > 1e-2


def test_random_adapters_differ(world):
    """The worlds above are no zeros."""
    model = load(world[0], dtype="float32")
    assert all(np.abs(x).max() > 0.01 for x in product(random_adapter(model, 2)).values())
