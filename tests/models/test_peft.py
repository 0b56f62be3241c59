"""PEFT adapter folders against peft itself: in, out, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.models.peft import (
    WEIGHTS_FILE,
    adapter_tensors,
    load_adapter,
    read_notes,
    save_adapter,
)
from panacea_jax.models.peft_config import CONFIG_FILE
from tests.families import build, save
from tests.models.made_by_peft import ALL, TOKENS, peft_adapter, reloaded


@pytest.fixture(scope="module")
def ours(model):
    """Our logits of an adapter, compiled once an adapter's structure."""
    forward = jax.jit(lambda weights, params, tokens: model.apply(weights, params, tokens)[0])
    return lambda params: np.asarray(forward(model.weights, params, jnp.asarray(TOKENS)))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ALL},
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "down_proj"], "use_rslora": True},
    ],
    ids=["all", "q_v", "rank_stabilised"],
)
def test_adapters_made_by_peft_give_the_same_logits(base, model, ours, tmp_path, settings):
    theirs = peft_adapter(base, tmp_path / "adapter", **settings)
    adapter = lora.load(tmp_path / "adapter", model)
    assert (
        adapter.targets == tuple(n for n in ALL if n in settings["target_modules"])
        and adapter.rank == settings["r"]
    )
    scale = settings["lora_alpha"] / (settings["r"] ** (0.5 if settings.get("use_rslora") else 1))
    assert adapter.scale == pytest.approx(scale)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(adapter))
    np.testing.assert_allclose(ours(adapter), theirs, atol=1e-4)
    assert np.abs(theirs - ours(None)).max() > 1e-2


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_families_with_norms_of_heads_both_ways(tmp_path, family):
    base = save(build(family), tmp_path / "base")
    model = load(base, dtype="float32")
    theirs = peft_adapter(base, tmp_path / "theirs", r=2, lora_alpha=4, target_modules=ALL)
    adapter = lora.load(tmp_path / "theirs", model)
    ours = jax.jit(lambda weights, x: model.apply(weights, x, jnp.asarray(TOKENS))[0])
    np.testing.assert_allclose(ours(model.weights, adapter), theirs, atol=1e-4)
    save_adapter(adapter, tmp_path / "ours", str(base))
    np.testing.assert_allclose(reloaded(base, tmp_path / "ours"), theirs, atol=1e-5)


def random_adapter(model, targets, rank=2, alpha=3.0):
    fresh = lora.init(model, rank, alpha, targets, key=jax.random.key(5))
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(6), len(leaves))
    return jax.tree.unflatten(
        tree, [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
    )


@pytest.mark.parametrize(("targets", "alpha"), [(ALL, 3.0), (["q", "o", "up"], 2.5)])
def test_our_adapters_load_in_peft_and_give_the_same_logits(
    base, model, ours, tmp_path, targets, alpha
):
    adapter = random_adapter(model, targets, alpha=alpha)
    save_adapter(adapter, tmp_path / "a", str(base), {"epsilon": "applied"})
    np.testing.assert_allclose(ours(adapter), reloaded(base, tmp_path / "a"), atol=1e-4)
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, alpha, "LORA")
    assert read_notes(tmp_path / "a") == {"format": "pt", "epsilon": "applied"}


def test_round_trip_is_exact(model, tmp_path):
    adapter = random_adapter(model, ("q", "down"))
    save_adapter(adapter, tmp_path / "a", "base")
    again = load_adapter(tmp_path / "a", model)
    assert (again.rank, again.alpha) == (adapter.rank, adapter.alpha)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, adapter, again)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(again))


def test_names_and_orientation(model):
    """PEFT keeps A as [r, in] and B as [out, r], one tensor a layer."""
    adapter = random_adapter(model, ("v", "gate"))
    tensors = adapter_tensors(adapter)
    assert len(tensors) == 2 * 2 * model.config.num_layers
    for block, name in (("self_attn", "v_proj"), ("mlp", "gate_proj")):
        for layer in range(model.config.num_layers):
            stem = f"base_model.model.model.layers.{layer}.{block}.{name}"
            pair = adapter.layers[block][name]
            np.testing.assert_array_equal(
                tensors[f"{stem}.lora_A.weight"], np.asarray(pair["a"][layer]).T
            )
            np.testing.assert_array_equal(
                tensors[f"{stem}.lora_B.weight"], np.asarray(pair["b"][layer]).T
            )


def test_lower_precision_is_widened(model, tmp_path):
    adapter = random_adapter(model, ("q",))
    save_adapter(adapter, tmp_path / "a", "base")
    path = tmp_path / "a" / WEIGHTS_FILE
    halves = {n: t.astype(np.float16) for n, t in load_file(path).items()}
    save_file(halves, path)
    again = load_adapter(tmp_path / "a", model)
    a = again.layers["self_attn"]["q_proj"]["a"]
    assert a.dtype == jnp.float32
    np.testing.assert_array_equal(
        a[0],
        halves["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].T.astype(
            np.float32
        ),
    )


@pytest.fixture
def folder(model, tmp_path):
    save_adapter(random_adapter(model, ("q",)), tmp_path / "a", "base")
    return tmp_path / "a"


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"alora_invocation_tokens": [1]},
        {"bias": "all"},
        {"peft_type": "LOHA"},
        {"r": 0},
        {"r": "many"},
        {"lora_alpha": None},
    ],
    ids=lambda c: next(iter(c)),
)
def test_settings_we_do_not_have_are_refused(model, folder, change):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="adapter_config.json"):
        load_adapter(folder, model)


def test_adapters_of_other_shapes_are_refused(model, folder, tmp_path):
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"
    good = load_file(folder / WEIGHTS_FILE)
    other = random_adapter(
        load(save(build("llama2", num_hidden_layers=2), tmp_path / "small"), dtype="float32"),
        ("q",),
    )
    for tensors, wanted in (
        (
            {**good, name: good[name][:5].copy()},
            r"layers\.2\.self_attn\.q_proj\.lora_B has shape \(5, 2\), the base wants \(64, 2\)",
        ),
        (
            {n: t for n, t in good.items() if n != name},
            r"layers\.2\.self_attn\.q_proj\.lora_B is missing",
        ),
        ({n: t for n, t in good.items() if "lora_A" in n}, r"lora_B is missing"),
        (adapter_tensors(other), r"has shape|is missing"),
        (
            {**good, "base_model.model.model.embed_tokens.lora_embedding_A": good[name]},
            "embed_tokens",
        ),
        ({**good, name.replace("self_attn", "mlp"): good[name]}, r"mlp\.q_proj"),
        ({}, "no LoRA factors"),
    ):
        save_file(tensors, folder / WEIGHTS_FILE)
        with pytest.raises(InputError, match=wanted):
            load_adapter(folder, model)


@pytest.mark.parametrize("kind", ["F8_E4M3", "I8", "BOOL"])
def test_factors_of_types_that_are_no_numbers_of_ours_are_refused(kind, model, folder):
    """numpy has no name for the first, and would take the others for numbers; under the names and with the bytes of a good file."""
    good = load_file(folder / WEIGHTS_FILE)
    header, at = {}, 0
    for name, tensor in good.items():
        header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [at, at + tensor.size]}
        at += tensor.size
    text = json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))
    with pytest.raises(InputError, match=rf"{WEIGHTS_FILE}: tensor \S+ has type {kind}; known: BF16"):
        load_adapter(folder, model)


def test_missing_pickled_and_damaged_weights(model, folder, tmp_path):
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(InputError, match=f"{WEIGHTS_FILE}: damaged or truncated"):
        load_adapter(folder, model)
    shutil.move(weights, folder / "adapter_model.bin")
    with pytest.raises(InputError, match="pickled weights only"):
        load_adapter(folder, model)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=f"has no {WEIGHTS_FILE}"):
        load_adapter(folder, model)
    with pytest.raises(InputError, match="not a PEFT adapter folder"):
        load_adapter(tmp_path / "none", model)
