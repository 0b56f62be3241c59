"""SafeMERGE: decisions and products equal NumPy in float64, merged factors equal peft's own; limits and what is refused."""

import jax
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from panacea_jax.config import get_config, make_defence
from panacea_jax.defences import SafeMerge
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.models.peft import save_adapter
from panacea_jax.train.once import apply_once
from tests.defences.test_resta import product
from tests.defences.test_safelora import TARGETS, by_numpy, random_adapter, world

__all__ = ["world"]  # a fixture


@pytest.fixture(scope="module")
def safe(world, tmp_path_factory):
    """(folder, adapter) of the rank of the one that is healed, at another scale."""
    model = load(world[1], dtype="float32")
    adapter = random_adapter(model, 9)
    adapter = lora.Adapter(adapter.layers, adapter.rank, alpha=4.5)
    folder = tmp_path_factory.mktemp("safemerge") / "safe"
    save_adapter(adapter, folder, str(world[1]))
    return folder, adapter


def merged(world, **settings):
    base, aligned, _, adapter = world
    defence = SafeMerge(base=str(base), **settings)
    found = apply_once(load(aligned, dtype="float32"), adapter, defence, {})
    return found.deployed, defence.report(adapter, found.state)


def middle(world):
    """A threshold with cosines on both sides of it."""
    cosines = sorted(c for c, _, _ in by_numpy(world[0], world[1], world[3]).values())
    return 0.5 * (cosines[2] + cosines[3])


def test_equals_numpy(world, safe):
    tau = middle(world)
    found, report = merged(world, safe=str(safe[0]), threshold=tau, weight=0.3)
    want = by_numpy(world[0], world[1], world[3])
    own, other, ours = (product(a) for a in (world[3], safe[1], found))
    assert ours.keys() == own.keys() and found.rank == 6 and found.scale == world[3].scale
    chosen = 0
    for name, (cosine, _, _) in want.items():
        module = name.removesuffix(".lora_B.weight")
        layer, target = int(name.split(".")[4]), name.split(".")[6]
        assert report["cosines"][target][layer] == pytest.approx(cosine, abs=1.1e-5)
        assert (cosine < tau) == (layer in report["merged"][target])
        chosen += cosine < tau
        wanted = 0.7 * own[module] + 0.3 * other[module] if cosine < tau else own[module]
        np.testing.assert_allclose(ours[module], wanted, rtol=1e-5, atol=1e-6)
    assert chosen == 3


def test_factors_are_those_of_peft(world, safe, tmp_path):
    """peft's combination "linear", which the public code calls for every module below τ: here for all."""
    base, _, _, adapter = world
    save_adapter(adapter, tmp_path / "tuned", str(base))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "tuned"), adapter_name="tuned")
    theirs.load_adapter(str(safe[0]), adapter_name="safe")
    theirs.add_weighted_adapter(["tuned", "safe"], [0.8, 0.2], "merged", combination_type="linear")
    deltas = {
        f"base_model.model.{name.removeprefix('base_model.model.')}": module.get_delta_weight("merged").detach().numpy()
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    found, report = merged(world, safe=str(safe[0]), threshold=1.0, merge="factors")
    ours = product(found)
    assert found.rank == adapter.rank and sum(map(len, report["merged"].values())) == 6
    assert ours.keys() == deltas.keys()
    for name, delta in deltas.items():
        np.testing.assert_allclose(ours[name], delta, rtol=1e-4, atol=1e-5)
    assert torch.is_tensor(next(theirs.parameters()))


def test_alike_adapters(world, tmp_path):
    """Products of equal adapters are the adapter; factors come out at (√0.8 + √0.2)² of it, which the file says."""
    _, aligned, _, adapter = world
    save_adapter(adapter, tmp_path / "same", str(aligned))
    own = product(adapter)
    for merge, size in (("products", 1.0), ("factors", (np.sqrt(0.8) + np.sqrt(0.2)) ** 2)):
        found, _ = merged(world, safe=str(tmp_path / "same"), threshold=1.0, merge=merge)
        for name, x in product(found).items():
            np.testing.assert_allclose(x, size * own[name], rtol=1e-5, atol=1e-6)
    assert size == pytest.approx(1.8, abs=1e-6)


@pytest.mark.parametrize("settings", [{"threshold": -1.0}, {"threshold": 1.0, "weight": 0.0}])
@pytest.mark.parametrize("merge", ["products", "factors"])
def test_limits_leave_it_alone(world, safe, settings, merge):
    found, _ = merged(world, safe=str(safe[0]), merge=merge, **settings)
    own = product(world[3])
    for name, x in product(found).items():
        np.testing.assert_allclose(x, own[name], rtol=1e-6, atol=1e-7)


def test_of_weight_one_the_safe_adapter_is_left(world, safe):
    found, _ = merged(world, safe=str(safe[0]), threshold=1.0, weight=1.0)
    other = product(safe[1])
    for name, x in product(found).items():
        np.testing.assert_allclose(x, other[name], rtol=1e-5, atol=1e-6)


def test_in_a_work_directory_the_alignment_is_the_safe_adapter(world):
    """On the unaligned base, where an adapter made the aligned model: it is merged in, at w."""
    base, _, alignment, adapter = world
    model = load(base, dtype="float32")
    defence = SafeMerge(base=str(base), threshold=1.0).aligned_by(str(alignment))
    found = product(apply_once(model, adapter, defence, {}).deployed)
    own, other = product(adapter), product(lora.load(alignment, model))
    for name, x in found.items():
        np.testing.assert_allclose(x, 0.8 * own[name] + 0.2 * other[name], rtol=1e-5, atol=1e-6)


def test_what_is_refused(world, safe, tmp_path):
    base, aligned, _, adapter = world
    model = load(aligned, dtype="float32")

    def refused(text, params=adapter, m=model, **settings):
        with pytest.raises(InputError, match=text):
            apply_once(m, params, SafeMerge(**settings), {})

    good = {"base": str(base), "safe": str(safe[0])}
    refused(r"config\.defence\.safe is not set", base=str(base))
    refused(r"config\.defence\.base is not set: SafeMERGE needs", safe=str(safe[0]))
    refused("is the aligned model's", **good | {"base": str(aligned)})
    few = lora.init(model, 2, 4, TARGETS[:2], key=jax.random.key(0))
    save_adapter(few, tmp_path / "few", str(aligned))
    refused("does not adapt down_proj, which is to be merged", **good | {"safe": str(tmp_path / "few")})
    some = lora.init(model, 3, 4, TARGETS, key=jax.random.key(0), layers="1")
    save_adapter(some, tmp_path / "some", str(aligned))
    refused("does not adapt layer 0, which is to be merged", **good | {"safe": str(tmp_path / "some")})
    narrow = lora.init(model, 2, 4, TARGETS, key=jax.random.key(0))
    save_adapter(narrow, tmp_path / "narrow", str(aligned))
    refused("has rank 2, the adapter that is healed 3", **good | {"safe": str(tmp_path / "narrow"), "merge": "factors"})
    bare, params = full_parameters(model)
    refused("merges adapters, and there is none", params, bare, **good)
    with pytest.raises(InputError, match="config.train.full_parameters leaves none"):
        SafeMerge(**good).check(True)


@pytest.mark.parametrize(("key", "bad"), [("threshold", 2.0), ("weight", -0.1), ("weight", 1.5), ("merge", "some")])
def test_impossible_values(key, bad):
    section = get_config().heal.defence
    section.name = "safemerge"
    section[key] = bad
    with pytest.raises(InputError, match=rf"config\.heal\.defence\.{key}"):
        make_defence(section, "heal.")
