"""Safe Delta equals a PyTorch that inverts H and goes from input to input; its limits; what an adapter holds of it."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from panacea_jax.config import get_config, make_defence
from panacea_jax.data.batches import Stream, length_buckets
from panacea_jax.defences import Loss, SafeDelta
from panacea_jax.defences import safe_delta as module
from panacea_jax.errors import InputError
from panacea_jax.export import epsilon_tensors, save_model
from panacea_jax.healing.trial import changed
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load, random_model
from panacea_jax.models.peft import adapter_tensors, save_adapter
from panacea_jax.parallel import make_mesh
from panacea_jax.train.once import apply_once
from tests import runs
from tests import torch_oracle as oracle
from tests.defences.oracles import safe_delta as by_torch
from tests.defences.test_antidote import examples
from tests.families import FAMILIES, build, save
from tests.on_devices import on_devices
from tests.test_passes import BENCHMARK
from tests.tiny import write_model

# k has q's inputs, up gate's.
TARGETS = ("k", "o", "up", "down")
RECORDS = examples(2)


def streams(batch_size=4):
    """Of batches with rows of padding."""
    return {"alignment": Stream("alignment", RECORDS, batch_size, 0, False, length_buckets(32), row_multiple=3)}


def few(vocab):
    """Of a smaller vocabulary, all of one shape."""
    return {"alignment": Stream("alignment", examples(1, vocab=vocab), 4, 0, False, (32,), True)}


def noisy(tree, size, seed):
    """Everything moved, by another draw in each leaf."""
    leaves, form = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(form, [x + size * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)])


@pytest.fixture(params=["float32", "float64"])
def world(request, tmp_path, monkeypatch):
    """(folder of the base, model, dtype's tolerance). PyTorch has the same numbers, in float64."""
    oracle.use_float64_throughout(monkeypatch)
    with jax.enable_x64(request.param == "float64"):
        base = save(build("llama2"), tmp_path / "base")
        yield base, load(base, dtype=request.param), (1e-8 if request.param == "float64" else 1e-4)


def projections(model):
    """PyTorch's projections of all layers, by name without what peft adds."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): m
        for name, m in model.named_modules()
        if re.search(r"layers\.\d+\.(self_attn|mlp)\.\w+_proj(\.base_layer)?$", name) and hasattr(m, "weight")
    }


def torch_weights(base, adapter=None):
    """By projection its matrix in float64, and the model."""
    model = oracle.load_full(base, torch.float64) if adapter is None else oracle.load(base, adapter, torch.float64)
    found = {}
    for name, m in projections(model).items():
        found[name] = m.weight.detach().clone()
    if adapter is not None:
        for name, m in model.named_modules():
            if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight"):
                found[name.removeprefix("base_model.model.")] += m.get_delta_weight("default").detach()
    return found, model


def assert_healed(ours, healed, aligned, tolerance):
    """Each projection as near as the tolerance, of what is left of the change."""
    errors = {}
    for name, w in healed.items():
        left = np.linalg.norm(w - aligned[name])
        assert left > 1e-3, name
        errors[name] = float(np.linalg.norm(ours[name] - w.numpy()) / left)
    worst = max(errors, key=errors.__getitem__)
    print(f"largest relative error {errors[worst]:.1e} ({worst}), tolerance {tolerance:.0e}")
    assert errors[worst] < tolerance


SETTINGS = {
    "code": {"budget": 0.3},
    "paper": {"budget": 0.3, "rule": "paper", "guarded": 0.0},
    "alone": {"budget": 0.3, "compensate": False, "guarded": 0.5},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_all_parameters(world, setting, tmp_path):
    base, model, tolerance = world
    bare, aligned = full_parameters(model)
    tuned = noisy(aligned, 0.02, 1)
    defence = SafeDelta(aligned=str(base), **SETTINGS[setting])
    result = apply_once(bare, tuned, defence, streams())
    ours, before, start = (epsilon_tensors(x) for x in (result.deployed, tuned, aligned))

    theirs = oracle.load_full(base, torch.float64)
    modules = projections(theirs)
    assert len(modules) == 21
    sums = by_torch.products(theirs, modules, RECORDS)
    healed, counts, costs = {}, {}, np.zeros(2)
    for name, m in modules.items():
        w0, w1 = m.weight.detach(), torch.tensor(np.asarray(before[f"{name}.weight"], np.float64))
        h = by_torch.hessian(sums[name], len(RECORDS), 0.01)
        healed[name], kept = by_torch.heal(h, w0, w1, **SETTINGS[setting])
        counts.setdefault(name.split(".")[-1], []).append(len(kept))
        left = healed[name] - w0
        costs += by_torch.cost(h, w1 - w0), by_torch.cost(h, left)
        if setting == "code":
            least = by_torch.least_cost(h, kept, w1 - w0)
            alone, _ = by_torch.heal(h, w0, w1, budget=0.3, compensate=False)
            assert least <= by_torch.cost(h, left) * (1 + 1e-9) and by_torch.cost(h, left) < by_torch.cost(h, alone - w0)
    assert_healed({n: ours[f"{n}.weight"] for n in healed}, healed, {n: m.weight.detach() for n, m in modules.items()}, tolerance)
    for name in ours:
        if name.removesuffix(".weight") not in modules:
            np.testing.assert_array_equal(ours[name], start[name], err_msg=name)
    said = defence.report(tuned, result.state)
    assert said["kept_inputs"] == counts
    sizes = {n.split(".")[-1]: m.in_features for n, m in modules.items()}
    assert any(0 < k < sizes[n] for n, each in counts.items() for k in each)
    assert [said["safety_loss"][k] for k in ("tuned", "healed")] == pytest.approx(costs, rel=1e-4)
    json.dumps(said)


def adapters(model, base, root, layers=""):
    """(the aligned adapter and its folder, the tuned one and its folder)."""
    fresh = lora.init(model, 3, 6, TARGETS, key=jax.random.key(0), layers=layers, dtype=model.dtype)
    aligned = dataclasses.replace(fresh, layers=noisy(fresh.layers, 0.1, 2))
    tuned = dataclasses.replace(fresh, layers=noisy(aligned.layers, 0.05, 3))
    for name, adapter in (("aligned", aligned), ("tuned", tuned)):
        save_adapter(adapter, root / name, str(base))
    return (aligned, root / "aligned"), (tuned, root / "tuned")


@pytest.mark.parametrize(
    ("start", "setting", "layers"),
    [("base", "code", ""), ("adapter", "code", ""), ("adapter", "paper", ""), ("adapter", "code", "1")],
)
def test_adapter(world, start, setting, layers, tmp_path):
    """As the matrices are healed, of the rank that it had; or of twice that, where another adapter aligned the base."""
    base, model, tolerance = world
    (_, folder), (tuned, tuned_folder) = adapters(model, base, tmp_path, layers)
    aligned = str(folder) if start == "adapter" else ""
    result = apply_once(model, tuned, SafeDelta(aligned=aligned, **SETTINGS[setting]), streams())
    assert (result.deployed.rank, result.deployed.scale) == (6 if aligned else 3, tuned.scale)
    assert result.deployed.adapted == tuned.adapted

    w0, theirs = torch_weights(base, folder if aligned else None)
    w1, _ = torch_weights(base, tuned_folder)
    bare, _ = torch_weights(base)
    sums = by_torch.products(theirs, projections(theirs), RECORDS)
    factors = adapter_tensors(result.deployed)
    healed, ours = {}, {}
    for name in w0:
        a, b = (factors.get(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
        if a is None:
            continue
        h = by_torch.hessian(sums[name], len(RECORDS), 0.01)
        healed[name], _ = by_torch.heal(h, w0[name], w1[name], **SETTINGS[setting])
        ours[name] = bare[name].numpy() + tuned.scale * (b.astype(float) @ a)
    assert len(healed) == (4 if layers else 12)
    assert_healed(ours, healed, w0, tolerance)
    pairs = zip(jax.tree.leaves(result.deployed), jax.tree.leaves(tuned), strict=True)
    padded = ((np.asarray(x, float), np.pad(y, [(0, n - m) for n, m in zip(x.shape, y.shape)])) for x, y in pairs)
    by_hand = np.sqrt(sum(np.square(x - y).sum() for x, y in padded))
    assert float(changed(result.deployed, tuned)) == pytest.approx(by_hand, rel=1e-5) and by_hand > 0.1


def test_its_limits(world, tmp_path):
    """Nothing is kept: the aligned model. Everything: the tuned one, to the bit where matrices are healed."""
    base, model, _ = world
    bare, aligned = full_parameters(model)
    tuned = noisy(aligned, 0.02, 1)
    nothing, everything = {"budget": 0.0}, {"budget": 1e9, "guarded": 0.0}

    def full(**numbers):
        return apply_once(bare, tuned, SafeDelta(aligned=str(base), **numbers), streams()).deployed

    for a, b in zip(jax.tree.leaves(full(**nothing)), jax.tree.leaves(aligned), strict=True):
        np.testing.assert_array_equal(a, b)
    for block in ("self_attn", "mlp"):
        for name, part in full(**everything)["layers"][block].items():
            np.testing.assert_array_equal(part["kernel"], tuned["layers"][block][name]["kernel"], err_msg=name)
    (start, folder), (after, _) = adapters(model, base, tmp_path)

    def factors(aligned, **numbers):
        found = apply_once(model, after, SafeDelta(aligned=aligned, **numbers), streams()).deployed
        return found.layers["mlp"]["down_proj"]

    pair, first = after.layers["mlp"]["down_proj"], start.layers["mlp"]["down_proj"]
    assert not factors("", **nothing)["a"].any()
    np.testing.assert_array_equal(factors("", **everything)["a"], pair["a"])
    found = factors(str(folder), **nothing)
    assert not found["a"][..., :3].any()
    np.testing.assert_array_equal(found["a"][..., 3:], first["a"])
    np.testing.assert_array_equal(found["b"][:, 3:], first["b"])
    found = factors(str(folder), **everything)
    np.testing.assert_array_equal(found["a"][..., :3], pair["a"])
    assert not found["a"][..., 3:].any()


def test_the_loss_is_half_the_sum_of_what_the_kept_entries_cost():
    """By the rule "code" ``½ tr(Δ H Δᵀ) = ½ Σ e²``, e the errors of the column after column."""
    rng = np.random.default_rng(0)
    x, delta = rng.normal(size=(40, 12)) @ rng.normal(size=(12, 12)), rng.normal(size=(12, 5))
    with jax.enable_x64(True):
        method = SafeDelta(budget=9.0)
        found = module.select(method, jnp.asarray(x.T @ x), 40, jnp.asarray(delta))
        kept = np.asarray(found.kept)
        assert 2 < kept.sum() < 10
        left = np.asarray(module.carry(method, found, jnp.asarray(delta)))
        h, lower = np.asarray(found.root @ found.root.T), np.asarray(found.factor)
        np.testing.assert_allclose(lower @ lower.T, np.linalg.inv(h), atol=1e-12)
        errors = np.linalg.solve(lower[kept][:, kept], delta[kept])
        assert np.trace(left.T @ h @ left) == pytest.approx(np.sum(errors**2), rel=1e-12)
        # An input that never differs from 0 has a diagonal of 1, before it is damped.
        x[:, 3] = 0
        h = np.asarray((root := module.select(method, jnp.asarray(x.T @ x), 40, jnp.asarray(delta)).root) @ root.T)
        assert h[3, 3] == pytest.approx(1 + 0.01 * np.mean([1, *(2 * np.delete(x, 3, 1) ** 2).sum(0) / 40]))


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_after_layer_is_the_whole_pass(family, tmp_path):
    """Hidden states and sums of every architecture: windows, biases, norms and bases of their own."""
    model = load(save(build(family), tmp_path / "hf"), dtype="float32")
    loss = Loss.of(model)
    batch = jax.tree.map(jnp.asarray, next(iter(streams()["alignment"].once())))
    states, read = jax.jit(lambda loss: loss.hidden_states(None, batch, ("input_products",)))(loss)
    x, _ = module._enter(loss, None, batch)
    valid = np.asarray(batch.valid)
    for layer in range(model.config.num_layers):
        np.testing.assert_allclose(np.asarray(x)[valid], np.asarray(states[layer])[valid], rtol=1e-4, atol=1e-4)
        x, found = module._through(loss, None, x, batch, layer, layer, True)
        assert set(found) == {"q_proj", "o_proj", "gate_proj", "down_proj"}
        for name, sums in read["input_products"].items():
            own = found[module._INPUTS_OF.get(name.partition(".")[2], name.partition(".")[2])]
            np.testing.assert_allclose(own, sums[layer], rtol=1e-3, atol=1e-3)
    last = loss.bind(None).norm(x)
    np.testing.assert_allclose(np.asarray(last)[valid], np.asarray(states[-1])[valid], rtol=1e-4, atol=1e-3)


def test_passes_and_compilations():
    """FLOPs by XLA's count: half a pass over the set, one forward, and each Gram matrix once; one program for all layers."""
    model = BENCHMARK["make_model"]()
    loss, batch = Loss.of(model), BENCHMARK["_batch"](0, 1)
    x, _ = module._enter(loss, None, batch)
    tokens, d, mlp = 8 * 64, 256, 512

    def flops(look):
        compiled = module._through.lower(loss, None, x, batch, 0, 0, look).compile()
        return compiled.cost_analysis()["flops"]

    by_hand = tokens * (2 * (4 * d * d + 3 * d * mlp) + 2 * 2 * 64 * d)
    assert flops(False) == pytest.approx(by_hand, rel=0.06)
    assert flops(True) - flops(False) == pytest.approx(2 * tokens * (3 * d * d + mlp * mlp), rel=0.03)
    adapter = noisy(lora.init(model, 2, 4, ("q", "down"), key=jax.random.key(1)), 0.1, 0)
    before = module._through._cache_size()
    apply_once(model, adapter, SafeDelta(), few(64))
    assert module._through._cache_size() == before + 1


def test_one_layers_gram_matrices_are_held_at_a_time(monkeypatch):
    config = dataclasses.replace(BENCHMARK["make_model"]().config, num_layers=5, intermediate_size=320)
    model = random_model(config, jax.random.key(0), mesh=make_mesh(devices=jax.devices()[:1]))
    held, inner = [], module.select

    def watched(*arguments):
        held.append(sum(x.shape == (320, 320) for x in jax.live_arrays()))
        return inner(*arguments)

    monkeypatch.setattr(module, "select", watched)
    adapter = noisy(lora.init(model, 2, 4, ("down",), key=jax.random.key(1)), 0.1, 0)
    apply_once(model, adapter, SafeDelta(), few(64))
    assert len(held) == 5 and set(held[1:]) == {held[1]} and held[1] <= 4, held


def test_bfloat16_and_few_bits_are_finite(tmp_path):
    base = write_model(tmp_path / "base")
    for more in ({}, {"quantization": "int8"}):
        model = load(base, dtype="bfloat16", **more)
        adapter = noisy(lora.init(model, 2, 4, ("q", "down"), key=jax.random.key(0)), 0.1, 0)
        healed = apply_once(model, adapter, SafeDelta(), few(40)).deployed
        for x, y in zip(jax.tree.leaves(healed), jax.tree.leaves(adapter), strict=True):
            assert x.dtype == y.dtype == jnp.float32 and np.isfinite(x).all()
        assert float(changed(healed, adapter)) > 0.1


def test_eight_devices_heal_as_one_does(tmp_path):
    found = on_devices("tests.defences.sharded_safe_delta", write_model(tmp_path / "base"), tmp_path)
    assert found.pop("devices") == 8 and set(found) == {"lora", "single", "full"}
    for name, (error, moved) in found.items():
        assert error < 1e-5 < 1e-2 < moved, (name, found)


# ---------------------------------------------------------------- command line


def healed_run(finished, root, *more):
    """What the healing of a finished run's fine-tuning says of itself."""
    place, run = finished
    shutil.copytree(run / "finetune", root / "finetune")
    flags = place.flags("--config.defence.name=safe_delta", "--config.defence.budget=0.05", *more)
    assert runs.panacea("heal", *flags, f"--workdir={root}") == 0
    return place, json.loads((root / "heal/manifest.json").read_text())


def test_all_parameters_are_compared_with_what_fine_tuning_began_with(tmp_path, tmp_path_factory):
    finished = runs.finished_full_run(tmp_path_factory)
    place, manifest = healed_run(finished, tmp_path, "--config.train.full_parameters=True")
    assert manifest["config"]["defence"]["aligned"] == str(place.base)
    assert str(place.base) in manifest["inputs"] and place.spec("alignment") in manifest["inputs"]
    kept = manifest["outcome"]["report"]["kept_inputs"]
    assert {len(x) for x in kept.values()} == {2} and len(kept) == 7
    folders = place.base, tmp_path / "finetune/model", tmp_path / "heal/model"
    base, tuned, healed = (load_file(folder / "model.safetensors") for folder in folders)
    assert healed.keys() == tuned.keys()
    for name, x in healed.items():
        assert np.isfinite(x).all()
        if "_proj" not in name:
            np.testing.assert_array_equal(x, base[name])
        else:
            assert np.linalg.norm(x - base[name]) > 0 and np.linalg.norm(x - tuned[name]) > 0


def test_an_adapter_that_went_on_from_the_aligned_one_gets_the_ranks_of_both(tmp_path, tmp_path_factory):
    _, run = finished = runs.finished_run(tmp_path_factory)
    _, manifest = healed_run(finished, tmp_path)
    assert manifest["config"]["defence"]["aligned"] == str(run / "align/adapter")
    out = tmp_path / "heal/adapter"
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    tuned, healed = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "finetune/adapter", out))
    assert tuned.keys() == healed.keys()
    assert all(np.isfinite(x).all() and x.shape != tuned[name].shape for name, x in healed.items())


def test_what_is_refused(tmp_path):
    base = write_model(tmp_path / "base")
    model = load(base, dtype="float32")
    adapter = lora.init(model, 2, 4, ("q", "down"), key=jax.random.key(0))

    def refused(text, params, m=model, **settings):
        with pytest.raises(InputError, match=text):
            apply_once(m, params, SafeDelta(**settings), few(40))

    bare, params = full_parameters(model)
    refused(r"config\.defence\.aligned is not set", params, bare)
    refused(r"config\.defence\.aligned = nowhere: .*no such model folder", params, bare, aligned="nowhere")
    other = write_model(tmp_path / "other", intermediate_size=40)
    refused(r"config\.defence\.aligned = .*other: .*_proj.* has shape", params, bare, aligned=str(other))
    save_adapter(lora.init(model, 2, 4, ("q", "v"), key=jax.random.key(0)), tmp_path / "v", str(base))
    refused(r"config\.defence\.aligned = .*: adapts other projections or layers", adapter, aligned=str(tmp_path / "v"))
    save_model(model, adapter, tmp_path / "merged")
    with pytest.raises(KeyError, match="alignment"):
        apply_once(model, adapter, SafeDelta(), {})


def test_an_h_without_an_inverse_is_refused(tmp_path):
    """Nine tokens leave most of 32 inputs without any, and next to nothing is added: no NaN is deployed."""
    model = load(write_model(tmp_path / "base"), dtype="float32")
    adapter = noisy(lora.init(model, 2, 4, ("q",), key=jax.random.key(0)), 0.1, 1)
    short = Stream("alignment", examples(1, vocab=40)[:1], 1, 0, False, (32,))
    assert len(short.examples[0].tokens) < 32
    with pytest.raises(InputError, match=r"config\.defence\.damping = 1e-10: H of q_proj in layer 0 has no Cholesky factor in float32"):
        apply_once(model, adapter, SafeDelta(damping=1e-10), {"alignment": short})
    healed = apply_once(model, adapter, SafeDelta(), {"alignment": short})
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(healed.deployed))


@pytest.mark.parametrize(
    ("key", "bad"), [("budget", -1.0), ("budget", float("nan")), ("damping", 0.0), ("guarded", 1.1), ("rule", "some")]
)
def test_impossible_values_name_the_key(key, bad):
    section = get_config().heal.defence
    section.name, section[key] = "safe_delta", bad
    with pytest.raises(InputError, match=rf"config\.heal\.defence\.{key}"):
        make_defence(section, "heal.")
