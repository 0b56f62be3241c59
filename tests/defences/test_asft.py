"""AsFT: five steps equal PyTorch, which forms every d × d matrix; limits, memory, resumed and packed runs, what is refused."""

import json

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from panacea_jax.defences import Asft, Loss, Sft
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.planning.abstract_step import tree_bytes
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from panacea_jax.train.step import state_shardings
from tests import runs
from tests.defences.oracles import asft
from tests.defences.test_finetuning_oracle import both, compare, setting
from tests.tiny import write_model
from tests.train.test_loop import assert_equal
from tests.train.test_packing import difference, streams

__all__ = ["setting"]  # a fixture

KEY = jax.random.key(0)
TARGETS = ("q", "up", "down")


def other_than(base, folder, spare=()):
    """A folder of the matrices of ``base`` with noise, but for those that are spared."""
    rng = np.random.default_rng(7)
    tensors = {
        name: x if x.ndim < 2 or name in spare else x + 0.05 * rng.normal(size=x.shape).astype(x.dtype)
        for name, x in load_file(base / "model.safetensors").items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


@both
def test_five_steps(setting, full, tmp_path):
    _, _, (base, _), _ = setting
    folder, tensors = other_than(base, tmp_path / "before")
    before = {name: torch.tensor(x) for name, x in tensors.items()}
    ours = compare(setting, full, Asft(lam=3.0, base=str(folder)), asft.gradients, lam=3.0, before=before)
    assert ours.compilations == 1


SPARED = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(model, folder of the weights before alignment, those tensors, base tensors)."""
    root = tmp_path_factory.mktemp("asft")
    base = write_model(root / "base")
    folder, before = other_than(base, root / "before", (SPARED,))
    return load(base, dtype="float32"), folder, before, load_file(base / "model.safetensors")


def prepared(place, params, **settings):
    """A defence that has looked at the model before, and its state."""
    model, folder, _, _ = place
    defence = Asft(base=str(folder), **settings)
    return defence, defence.first_pass(Loss.of(model), params, {}, jax.jit(defence.init)(params))


def fresh(model):
    return lora.init(model, 2, 8, TARGETS, key=KEY)


def moved(params, seed=1):
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed + x.size), x.shape), params)


def test_a_fresh_adapter_has_the_papers_penalty(place):
    """λ Σ ‖(I − Ĉ) B A‖² in NumPy and float64, without α/r; the module that alignment left alone has no part."""
    model, _, before, base = place
    params = fresh(model)
    defence, state = prepared(place, params, lam=2.0)
    after = moved(params)
    wanted = 0.0
    for target in params.targets:
        block = "self_attn" if target == "q_proj" else "mlp"
        for layer in range(2):
            name = f"model.layers.{layer}.{block}.{target}.weight"
            v = base[name].astype(float) - before[name]
            counts = bool(v.any())
            assert counts == (name != SPARED) == bool(state.counts[target][layer])
            ba = np.asarray(after.layers[block][target]["b"][layer].T, float) @ np.asarray(after.layers[block][target]["a"][layer].T)
            if counts:
                wanted += 2.0 * np.linalg.norm(ba - v @ v.T @ ba / np.linalg.norm(v)) ** 2
    assert float(defence._penalty(after, state)) == pytest.approx(wanted, rel=1e-5)


def quadratic(params, batch):
    return 0.5 * sum(jnp.sum((x - batch) ** 2) for x in jax.tree.leaves(params))


def test_limits_are_sft(place):
    """Without λ, and at the start, though that adapter adds something; on a loss in closed form."""
    params, batches = moved(fresh(place[0])), {"user": jnp.asarray(0.3)}
    after = moved(params, 5)
    defence, state = prepared(place, params, lam=5.0)
    still, _, metrics = defence.gradient(quadratic, params, batches, state, KEY)
    assert float(metrics["penalty"]) == 0
    assert_equal(still, Sft().gradient(quadratic, params, batches, (), KEY)[0])
    plain = Sft().gradient(quadratic, after, batches, (), KEY)[0]
    assert_equal(Asft(lam=0.0).gradient(quadratic, after, batches, state, KEY)[0], plain)
    grads, _, metrics = defence.gradient(quadratic, after, batches, state, KEY)
    assert float(metrics["penalty"]) > 1e-3 and difference(grads, plain) > 1e-2


def shapes_of(jaxpr):
    for equation in jaxpr.eqns:
        yield from (x.aval.shape for x in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes_of(inner)


def test_no_square_matrix_for_an_adapter_and_the_memory_that_is_stated(place):
    """Neither in × in nor out × out (32, 48) appears; the state is w₀ and one matrix as large as its own for every module."""
    model = place[0]
    params = lora.init(model, 2, 8, ("up", "down"), key=KEY)
    defence = Asft()
    state = jax.eval_shape(defence.init, params)
    traced = jax.make_jaxpr(jax.grad(defence._penalty))(params, state)
    shapes = set(shapes_of(traced.jaxpr))
    assert (2, 4, 48) in shapes and not {s[-2:] for s in shapes} & {(32, 32), (48, 48)}
    kernels = [model.weights["layers"]["mlp"][f"{t}_proj"]["kernel"] for t in ("up", "down")]
    made = jax.jit(defence.init)(params)
    assert sum(x.size for x in jax.tree.leaves(made.direction)) == sum(x.size for x in kernels)
    assert {x.dtype for x in jax.tree.leaves(made.direction)} == {jnp.dtype("float32")}
    beside = sum(x.nbytes for x in jax.tree.leaves(made)) - sum(x.nbytes for x in (*kernels, *jax.tree.leaves(params)))
    assert beside == 2 * 2 * 4  # whether a layer counts
    places = state_shardings(state, params)
    planned = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)
    assert tree_bytes(planned) == sum(x.nbytes for x in jax.tree.leaves(made))


def run(place, defence, packing=False, full=False, steps=4, accumulate=1, checkpoints=None, dtype=None):
    model = place[0] if dtype is None else load(place[0].folder, dtype=dtype)
    bare, params = full_parameters(model) if full else (model, moved(fresh(model)))
    return finetune(
        bare, params, defence, streams(packing, defence), optimizer=make_optimizer(1e-2), steps=steps, checkpoints=checkpoints,
        accumulate=accumulate,
    )  # fmt: skip


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_stop_and_resume_is_bit_for_bit(place, full, tmp_path):
    defence = Asft(lam=0.5, base=str(place[1]))
    whole = run(place, defence, full=full)
    assert run(place, defence, full=full, steps=2, checkpoints=Checkpoints(tmp_path / "c")).steps == 2
    resumed = run(place, defence, full=full, checkpoints=Checkpoints(tmp_path / "c"))
    assert_equal((whole.params, whole.state), (resumed.params, resumed.state))
    assert whole.compilations == resumed.compilations == 1


def test_packed_and_in_micro_batches(place):
    """The penalty looks at no row and counts once."""
    defence = Asft(lam=0.5, base=str(place[1]))
    plain = run(place, defence)
    assert difference(run(place, defence, packing=True).deployed, plain.deployed) < 1e-5
    assert difference(run(place, defence, accumulate=2).deployed, plain.deployed) < 1e-4


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_bfloat16_is_finite(place, full):
    found = run(place, Asft(lam=0.5, base=str(place[1])), full=full, dtype="bfloat16")
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((found.params, found.state)))


def test_what_is_refused(place, tmp_path):
    model, folder, before, _ = place
    params = fresh(model)

    def refused(text, **settings):
        defence = Asft(**settings)
        with pytest.raises(InputError, match=text):
            defence.first_pass(Loss.of(model), params, {}, defence.init(params))

    refused(r"config\.defence\.base is not set: AsFT needs the model before its alignment")
    refused(r"config\.defence\.base = nowhere: .*no such model folder", base="nowhere")
    refused("is the model that fine-tuning starts from", base=str(model.folder))
    name = "model.layers.1.self_attn.q_proj.weight"
    (tmp_path / "lacks").mkdir()
    save_file({n: x for n, x in before.items() if n != name}, tmp_path / "lacks" / "model.safetensors")
    refused(name, base=str(tmp_path / "lacks"))
    few = load(model.folder, dtype="float32", quantization="int8")
    defence = Asft(base=str(folder))
    with pytest.raises(InputError, match="config.model.quantization = int8: AsFT needs whole weights"):
        defence.first_pass(Loss.of(few), params, {}, defence.init(params))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"config\.defence\.lam"):
            Asft(lam=bad)


def test_the_command(tmp_path, capsys):
    """Every step logs the same scalars, the penalty among them; without a base nothing is written."""
    place = runs.make_place(tmp_path / "place")
    folder, _ = other_than(place.base, tmp_path / "before")
    flags = place.flags("--config.defence.name=asft", "--config.train.steps=2", "--config.checkpoint.every=0")
    assert runs.panacea("finetune", *flags, f"--workdir={tmp_path / 'new'}") == 2
    assert "config.defence.base is not set" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert runs.panacea("finetune", *flags, f"--config.defence.base={folder}", f"--workdir={tmp_path / 'run'}") == 0
    rows = [json.loads(x) for x in (tmp_path / "run/finetune/metrics.jsonl").read_text().splitlines()]
    assert len({frozenset(r) for r in rows}) == 1 and rows[-1]["penalty"] > 0
    manifest = json.loads((tmp_path / "run/finetune/manifest.json").read_text())
    assert str(folder) in manifest["inputs"]
