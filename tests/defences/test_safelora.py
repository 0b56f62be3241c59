"""Safe LoRA equals NumPy, which forms Δ and P and multiplies them out in float64; its decisions exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from panacea_jax.config import get_config, make_defence
from panacea_jax.defences import SafeLora
from panacea_jax.defences.safelora import SafeLoraState
from panacea_jax.errors import InputError
from panacea_jax.export import save_model
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.models.peft import adapter_tensors, save_adapter
from panacea_jax.train.once import apply_once
from tests.tiny import write_model

TARGETS = ("q", "v", "down")


def random_adapter(model, seed, rank=3):
    fresh = lora.init(model, rank, 6, TARGETS, key=jax.random.key(seed))
    layers = jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(seed + x.size), x.shape), fresh.layers
    )
    return dataclasses.replace(fresh, layers=layers)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder of the base, of the aligned model, of the adapter that leads there, the adapter to heal)."""
    root = tmp_path_factory.mktemp("safelora")
    base = write_model(root / "base")
    model = load(base, dtype="float32")
    alignment = random_adapter(model, 1)
    save_adapter(alignment, root / "alignment", str(base))
    save_model(model, alignment, root / "aligned")
    tuned = random_adapter(model, 2)
    # One module that stays within the alignment's subspace, so that not all cosines are alike.
    down = {
        k: x.at[1].set(alignment.layers["mlp"]["down_proj"][k][1])
        for k, x in tuned.layers["mlp"]["down_proj"].items()
    }
    layers = {**tuned.layers, "mlp": {"down_proj": down}}
    return base, root / "aligned", root / "alignment", dataclasses.replace(tuned, layers=layers)


def by_numpy(base, aligned, adapter):
    """By module, as PEFT names it: cosine, P B and B, in float64."""
    old, new = (load_file(f / "model.safetensors") for f in (base, aligned))
    factors = {n: x.astype(np.float64) for n, x in adapter_tensors(adapter).items()}
    found = {}
    for name, b in factors.items():
        if "lora_B" not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        delta = (new[f"{module}.weight"].astype(np.float64)) - old[f"{module}.weight"]
        projection = delta @ delta.T / np.linalg.norm(delta)
        a = factors[name.replace("lora_B", "lora_A")]
        x, y = (projection @ b @ a).ravel(), (b @ a).ravel()
        found[name] = np.round(x @ y / np.linalg.norm(x) / np.linalg.norm(y), 5), projection @ b, b
    return found


def healed(model, adapter, **settings):
    defence = SafeLora(**settings)
    result = apply_once(model, adapter, defence, {})
    return adapter_tensors(result.deployed), result, defence.report(adapter, result.state)


@pytest.mark.parametrize("how", ["folder", "adapter"])
@pytest.mark.parametrize("select", ["threshold", "number"])
def test_equals_numpy(world, how, select):
    base, aligned, alignment, adapter = world
    want = by_numpy(base, aligned, adapter)
    cosines = sorted(c for c, _, _ in want.values())
    assert len(cosines) == 6 and cosines[0] < 0.5 < cosines[-1]
    tau = 0.5 * (cosines[2] + cosines[3]) if select == "threshold" else cosines[2]
    settings = {"threshold": tau} if select == "threshold" else {"num_layers": 3}
    # either the model that is loaded is the aligned one, or an adapter makes it of the base
    model = load(aligned if how == "folder" else base, dtype="float32")
    merge = {"aligned": str(alignment)} if how == "adapter" else {}
    ours, result, report = healed(
        model, adapter, base=str(base), select=select, **settings, **merge
    )
    before, projected = adapter_tensors(adapter), 0
    similarity = []
    for name, (cosine, b, old) in want.items():
        layer, target = int(name.split(".")[4]), name.split(".")[6]
        assert result.state.cosine[target][layer] == pytest.approx(cosine, abs=1.1e-5)
        chosen = cosine <= tau
        projected += chosen
        assert chosen == (layer in report["projected"][target])
        np.testing.assert_allclose(ours[name], b if chosen else before[name], rtol=2e-5, atol=2e-6)
        similarity.append(1 / (1 + np.linalg.norm((b if chosen else old) - b)))
        a = name.replace("lora_B", "lora_A")
        np.testing.assert_array_equal(ours[a], before[a])
    assert projected == 3
    assert report["similarity"] == pytest.approx(np.mean(similarity), rel=1e-5)
    assert report["threshold"] == pytest.approx(tau, abs=1.1e-5)


def test_ties_add_modules():
    cosine = {"q_proj": np.asarray([0.3, 0.1]), "v_proj": np.asarray([0.1, 0.2])}
    state = SafeLoraState({t: jnp.ones((2, 1, 2)) for t in cosine}, cosine)
    pair = {"a": jnp.zeros((2, 3, 1)), "b": jnp.zeros((2, 1, 2))}
    adapter = lora.Adapter({"self_attn": {t: dict(pair) for t in cosine}}, 1, 1.0)
    new = SafeLora(base="x", num_layers=1).finish(adapter, state).layers["self_attn"]
    assert {t: new[t]["b"][:, 0, 0].tolist() for t in cosine} == {
        "q_proj": [0, 1],
        "v_proj": [1, 0],
    }
    assert not adapter.layers["self_attn"]["q_proj"]["b"].any(), "the argument was changed"


def test_what_is_refused(world, tmp_path):
    base, aligned, _, adapter = world
    model = load(aligned, dtype="float32")

    def refused(text, params=adapter, m=model, **settings):
        with pytest.raises(InputError, match=text):
            apply_once(m, params, SafeLora(**settings), {})

    refused(r"config\.defence\.base is not set")
    refused(r"config\.defence\.base = nowhere: .*no such model folder", base="nowhere")
    refused("is the aligned model's", base=str(aligned))
    refused(r"num_layers = 7: the adapter has 6 modules", base=str(base), num_layers=7)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    for i, changed in enumerate(
        ({n: x for n, x in tensors.items() if n != name}, tensors | {name: tensors[name][:-1]})
    ):
        (tmp_path / str(i)).mkdir()
        save_file(changed, tmp_path / str(i) / "model.safetensors")
        refused(name, base=str(tmp_path / str(i)))
    bare, params = full_parameters(model)
    refused("projects the B of an adapter", params, bare, base=str(base))


@pytest.mark.parametrize(
    ("key", "bad"), [("threshold", 2.0), ("num_layers", 0), ("select", "some")]
)
def test_impossible_values(key, bad):
    section = get_config().heal.defence
    section.name = "safelora"
    section[key] = bad
    with pytest.raises(InputError, match=rf"config\.heal\.defence\.{key}"):
        make_defence(section, "heal.")
