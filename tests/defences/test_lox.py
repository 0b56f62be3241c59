"""LoX: SFT's five steps and then NumPy's SVD; of a given pair NumPy alone; limits and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from panacea_jax.config import get_config, make_defence
from panacea_jax.defences import Lox, Sft
from panacea_jax.defences.protocol import extra_data, has_steps, passes_of
from panacea_jax.errors import InputError
from panacea_jax.export import epsilon_tensors
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.models.peft import adapter_tensors
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.once import apply_once
from tests import runs
from tests import torch_oracle as oracle
from tests.defences.test_asft import other_than
from tests.defences.test_finetuning_oracle import both, names, our_run, setting, torch_run, vlguard
from tests.tiny import write_model
from tests.train.test_loop import assert_equal
from tests.train.test_loop import run as short_run

__all__ = ["setting"]  # a fixture


def top(delta, k):
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :k] * s[:k]) @ v[:k]


def products(tensors, scale):
    """s B A by module."""
    return {
        name.removesuffix(".lora_B.weight"): scale * b @ tensors[name.replace("lora_B", "lora_A")]
        for name, b in tensors.items()
        if "lora_B" in name
    }


@both
def test_five_steps_and_the_singular_values(setting, full):
    model, adapter, (base, _), tolerance = setting
    k, alpha = 2, 1.25
    ours = our_run(setting, full, Lox(k=k, alpha=alpha))
    assert_equal(ours.params, our_run(setting, full, Sft()).params)
    theirs = {name: x.astype(np.float64) for name, x in torch_run(setting, full, vlguard.gradients, lam=0).items()}
    found = names(ours.deployed, full)
    if full:
        start = oracle.by_peft_name(oracle.trainable(oracle.load_full(base, getattr(torch, str(model.dtype)))))
        wanted = {n: w + alpha * top(w - start[n], k) if w.ndim > 1 else w for n, w in theirs.items()}
        assert any("embed_tokens" in n for n in wanted) and any(w.ndim == 1 for w in wanted.values())
        before = theirs
    else:
        assert ours.deployed.rank == adapter.rank
        found = products(found, adapter.scale)
        before = products(theirs, adapter.scale)
        wanted = {n: w + alpha * top(w, k) for n, w in before.items()}
    assert found.keys() == wanted.keys()
    errors = [np.linalg.norm(found[n] - w) / np.linalg.norm(w) for n, w in wanted.items()]
    print(f"largest relative error {max(errors):.1e}")
    assert max(errors) < tolerance
    if not full:
        assert min(np.linalg.norm(wanted[n] - w) / np.linalg.norm(w) for n, w in before.items()) > 0.5


def test_limits():
    """k = 0 and α = 0 are SFT; from the rank on everything is stretched by 1 + α."""
    shape = {"a": (2, 8, 3), "b": (2, 3, 6)}
    pair = {n: jax.random.normal(jax.random.key(len(n) + x[1]), x) for n, x in shape.items()}
    adapter = lora.Adapter({"self_attn": {"q_proj": pair}}, 3, 6.0)
    for still in (Lox(k=0), Lox(alpha=0.0)):
        assert_equal(still.finish(adapter, still.init(adapter)), adapter)
    for k in (3, 6, 100):
        moved = Lox(k=k, alpha=0.5).finish(adapter, Lox().init(adapter)).layers["self_attn"]["q_proj"]
        np.testing.assert_allclose(moved["b"], 1.5 * pair["b"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(moved["a"], pair["a"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(folder of the aligned model, of the one before)."""
    root = tmp_path_factory.mktemp("lox")
    base = write_model(root / "aligned")
    return base, other_than(base, root / "before")[0]


@pytest.mark.parametrize("k", [0, 3, 100])
def test_a_given_pair(place, k):
    """Every matrix, vectors stay; no step, no data, no passes."""
    aligned, before = place
    model, params = full_parameters(load(aligned, dtype="float32"))
    defence = Lox(k=k, alpha=0.7, base=str(before))
    assert not has_steps(defence) and passes_of(defence) == {} and extra_data(defence) == ("unaligned base",)
    found = epsilon_tensors(apply_once(model, params, defence, {}).deployed)
    new, old = (load_file(f / "model.safetensors") for f in (aligned, before))
    for name, w in new.items():
        wanted = w + 0.7 * top(w.astype(float) - old[name], k) if w.ndim > 1 else w
        np.testing.assert_allclose(found[name], wanted, rtol=2e-5, atol=2e-6)
    changed = {name for name, w in new.items() if not np.array_equal(found[name], w)}
    assert changed == ({name for name, w in new.items() if w.ndim > 1} if k else set())


def test_of_itself_it_trains():
    assert has_steps(Lox()) and passes_of(Lox()) == {"user": 1} and extra_data(Lox()) == ()
    assert Lox().folders is None


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_stop_and_resume_is_bit_for_bit(place, full, tmp_path):
    model, defence = load(place[0], dtype="float32"), Lox(k=2)
    whole = short_run(model, full, defence, steps=4)
    short_run(model, full, defence, steps=2, checkpoints=Checkpoints(tmp_path / "c"))
    resumed = short_run(model, full, defence, steps=4, checkpoints=Checkpoints(tmp_path / "c"))
    assert_equal((whole.params, whole.state, whole.deployed), (resumed.params, resumed.state, resumed.deployed))
    assert whole.compilations == resumed.compilations


def test_bfloat16_is_finite(place):
    model = load(place[0], dtype="bfloat16")
    for full in (False, True):
        found = short_run(model, full, Lox(k=2), steps=2)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found.deployed))


def test_what_is_refused(place):
    aligned, before = place
    model, params = full_parameters(load(aligned, dtype="float32"))
    with pytest.raises(InputError, match="is the aligned model; give the one before"):
        apply_once(model, params, Lox(base=str(aligned)), {})
    with pytest.raises(InputError, match=r"config\.defence\.base = nowhere: .*no such model folder"):
        Lox(base="nowhere").check(True)
    with pytest.raises(InputError, match=r"leaves a whole model; set train\.full_parameters"):
        Lox(base=str(before)).check(False)
    for key, bad in (("k", -1), ("alpha", -0.5), ("alpha", float("nan"))):
        section = get_config().align.defence
        section.name = "lox"
        section[key] = bad
        with pytest.raises(InputError, match=rf"config\.align\.defence\.{key}"):
            make_defence(section, "align.")


def test_fine_tuning_goes_on_from_a_given_pair(tmp_path):
    """A run without any alignment set: LoX leaves a model, on which an adapter is trained."""
    place = runs.make_place(tmp_path / "place")
    before, _ = other_than(place.base, tmp_path / "before")
    flags = place.flags(
        "--config.align.defence.name=lox", f"--config.align.defence.base={before}", "--config.align.defence.k=2",
        "--config.align.train.full_parameters=True", "--config.data.alignment=", "--config.defence.name=sft", "--config.train.steps=2",
        "--config.eval.tasks=()",
    )  # fmt: skip
    workdir = tmp_path / "run"
    assert runs.panacea("run", *flags, f"--workdir={workdir}") == 0
    aligned = json.loads((workdir / "align" / "manifest.json").read_text())
    assert (aligned["outcome"]["steps"], aligned["outcome"]["records"]) == (0, {}) and str(before) in aligned["inputs"]
    tuned = json.loads((workdir / "finetune" / "manifest.json").read_text())
    assert tuned["config"]["model"]["path"] == str(workdir / "align" / "model") and tuned["config"]["lora"]["init_from"] == ""
    new, old, was = (load_file(f / "model.safetensors") for f in (workdir / "align" / "model", place.base, before))
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(new[name], old[name] + 1.25 * top(old[name] - was[name], 2), rtol=1e-4, atol=1e-5)
    adapter = adapter_tensors(lora.load(workdir / "finetune" / "adapter", load(workdir / "align" / "model", dtype="float32")))
    assert max(np.abs(x).max() for n, x in adapter.items() if "lora_B" in n) > 0
