"""What leaves a run: w + ε exactly, loadable by peft and transformers with the same logits; merging; ε on its own; convert."""

import dataclasses
import json
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import panacea_jax as pj
from panacea_jax import export
from panacea_jax.config import get_config
from panacea_jax.errors import InputError
from panacea_jax.models.peft import adapter_tensors, read_notes
from panacea_jax.models.tensorfile import Entry, write_tensors
from panacea_jax.stages import train as stage
from panacea_jax.stages.layers import from_checkpoint
from panacea_jax.stages.lineage import Start
from panacea_jax.train.checkpoints import read_checkpoint
from tests import runs
from tests.runs import panacea

WEIGHTS = "adapter/adapter_model.safetensors"
TOKENS = np.random.default_rng(0).integers(3, 40, (2, 9))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place, workdir = runs.finished_run(tmp_path_factory)
    return place.base, workdir


@pytest.fixture(scope="module")
def model(finished):
    return pj.load(finished[0], dtype="float32")


@pytest.fixture(scope="module")
def adapters(finished, model):
    """w + ε as exported, ε, and w as the checkpoint has it; as our trees."""
    _, workdir = finished
    deployed = pj.lora.load(workdir / "finetune" / "adapter", model)
    epsilon = export.load_epsilon(workdir / "finetune" / "epsilon.safetensors")
    w = export.adapter_from_checkpoint(workdir / "finetune" / "checkpoints" / str(runs.STEPS))
    return deployed, epsilon, w


@pytest.fixture(scope="module")
def result(model, adapters):
    """The finished run's Result, put together from its files."""
    deployed, epsilon, w = adapters
    epsilon = pj.lora.Adapter(jax.tree.map(jnp.asarray, epsilon), w.rank, w.alpha)
    w = pj.lora.Adapter(jax.tree.map(jnp.asarray, w.layers), w.rank, w.alpha)
    return pj.Result(model, w, epsilon, deployed, None, runs.STEPS, (), 1)


@pytest.fixture(scope="module")
def ours(model):
    forward = jax.jit(lambda weights, params, tokens: model.apply(weights, params, tokens)[0])
    return lambda params, weights=None: np.asarray(
        forward(weights or model.weights, params, jnp.asarray(TOKENS))
    )


def torch_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(torch_model):
    with torch.no_grad():
        return torch_model.eval()(torch.tensor(TOKENS)).logits.numpy()


# ---------------------------------------------------------------- w + ε


def test_deployed_is_w_plus_epsilon_exactly(finished, adapters):
    """adapter/, epsilon.safetensors and the checkpoint agree to the last bit, and ‖ε‖ = ρ."""
    deployed, epsilon, w = adapters
    jax.tree.map(
        lambda d, e, x: np.testing.assert_array_equal(np.asarray(d), x + e),
        deployed.layers,
        epsilon,
        w.layers,
    )
    leaves = jax.tree.leaves(epsilon)
    assert leaves and np.sqrt(
        sum(np.sum(np.square(e, dtype=np.float64)) for e in leaves)
    ) == pytest.approx(runs.RHO, rel=1e-6)
    assert (w.rank, w.alpha) == (deployed.rank, deployed.alpha)
    arrays, notes = read_checkpoint(finished[1] / "finetune" / "checkpoints" / str(runs.STEPS))
    assert int(arrays["step"]) == runs.STEPS and notes["lora_scale"] == 2.0
    np.testing.assert_array_equal(
        arrays["defence.epsilon.layers.mlp.down_proj.b"], epsilon["mlp"]["down_proj"]["b"]
    )


def test_taking_w_from_a_checkpoint_warns(finished, caplog):
    with caplog.at_level(logging.WARNING):
        export.adapter_from_checkpoint(finished[1] / "finetune" / "checkpoints" / str(runs.STEPS))
    assert export.WITHOUT_EPSILON in caplog.text


def test_export_adapter_needs_the_flag_for_w_alone(result, finished, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        pj.export_adapter(result, tmp_path / "healed")
        assert "MORE harmful" not in caplog.text
        pj.export_adapter(result, tmp_path / "bare", without_epsilon=True)
        assert "MORE harmful" in caplog.text
    healed, bare = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("healed", "bare")
    )
    stage_wrote = load_file(finished[1] / "finetune" / WEIGHTS)
    w = adapter_tensors(result.params)
    for name in w:
        np.testing.assert_array_equal(healed[name], stage_wrote[name])
        np.testing.assert_array_equal(bare[name], w[name])
    assert read_notes(tmp_path / "healed")["epsilon"] == "applied"
    assert read_notes(tmp_path / "bare")["epsilon"] == "left out"


@pytest.mark.parametrize("bare", [False, True])
def test_the_key_export_without_epsilon(result, tmp_path, caplog, bare):
    """config.export.without_epsilon in a stage: w alone in adapter/, ε beside it, and a warning; by default w + ε."""
    config = get_config()
    config.export.without_epsilon = bare
    with caplog.at_level(logging.WARNING):
        stage.export(config, tmp_path, Start("base"), result, result.epsilon)
    assert ("MORE harmful" in caplog.text) == bare
    found, wanted = (
        load_file(tmp_path / WEIGHTS),
        adapter_tensors(result.params if bare else result.deployed),
    )
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])
    epsilon = load_file(tmp_path / "epsilon.safetensors")
    for name, value in adapter_tensors(result.epsilon).items():
        np.testing.assert_array_equal(epsilon[name], value)


def test_a_defence_without_epsilon_warns_of_nothing(result, tmp_path, caplog):
    plain = dataclasses.replace(result, epsilon=None, deployed=result.params)
    (tmp_path / "s").mkdir()
    with caplog.at_level(logging.WARNING):
        pj.export_adapter(plain, tmp_path / "a", without_epsilon=True)
        stage.export(get_config(), tmp_path / "s", Start("base"), plain)
    assert not caplog.records and "epsilon" not in read_notes(tmp_path / "a")
    assert not list((tmp_path / "s").glob("epsilon*"))


# ---------------------------------------------------------------- nothing ruined, nothing by halves


def ruined(params, value):
    """The last layer's B of q with one such number in it."""
    layers = jax.tree.map(jnp.asarray, params.layers)
    q = layers["self_attn"]["q_proj"]
    q["b"] = q["b"].at[1, 0, 3].set(value)
    return dataclasses.replace(params, layers=layers)


@pytest.mark.parametrize(
    ("value", "why"),
    [(np.nan, "holds nan in float32"), (-np.inf, "holds -inf in float32"), (3e38, "its norm overflows (largest value 3e+38) in float32")],
)
def test_a_ruined_adapter_is_not_exported(result, adapters, tmp_path, value, why):
    stage.export(get_config(), tmp_path, Start("base"), result)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    bad = dataclasses.replace(result, deployed=ruined(adapters[0], value))
    with pytest.raises(InputError) as error:
        stage.export(get_config(), tmp_path, Start("base"), bad)
    assert "tensor base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight " + why in str(error.value)
    assert {p: p.read_bytes() for p in before} == before, "an older export stays"
    with pytest.raises(InputError, match="lora_B"):
        pj.export_adapter(bad, tmp_path / "adapter")
    assert {p: p.read_bytes() for p in before} == before
    with pytest.raises(InputError, match=r"tensor model.layers.1.self_attn.q_proj.weight"):
        pj.export_model(bad, tmp_path / "m")
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m.*"))


def test_what_a_narrower_dtype_cannot_hold_is_not_written(tmp_path):
    """1e5 is finite in float32, and is not in the float16 that the file is written in."""
    wide = Entry("w", (2,), np.dtype(np.float16), lambda: np.array([1.0, 1e5], np.float32))
    with pytest.raises(InputError, match=r"x.safetensors: not written: tensor w holds inf in float16"):
        write_tensors(tmp_path / "x.safetensors", [wide])
    assert not list(tmp_path.iterdir())


SAVE = """
import sys
import numpy as np
from pathlib import Path
from panacea_jax.models.adapter import Adapter
from panacea_jax.models.peft import save_adapter
pair = {"a": np.ones((1, 3, 2), np.float32), "b": np.ones((1, 2, 3), np.float32)}
save_adapter(Adapter({"self_attn": {"q_proj": pair}}, 2, 4.0), Path(sys.argv[1]), "base", {"epsilon": "applied", "zoo": "1", "a": "2"})
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    """Whatever seeds their hashes; readable by whom the umask lets."""
    for name in ("one", "two"):
        environment = os.environ | {"PYTHONHASHSEED": str(len(name) + ord(name[0]))}
        subprocess.run([sys.executable, "-c", SAVE, str(tmp_path / name)], env=environment, check=True, umask=0o022)
    one, two = (tmp_path / name / "adapter_model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert [p.stat().st_mode & 0o777 for p in sorted(one.parent.iterdir())] == [0o644, 0o644]


# ---------------------------------------------------------------- peft and transformers


def test_the_adapter_in_peft_gives_our_logits(finished, adapters, ours):
    base, workdir = finished
    adapted = peft.PeftModel.from_pretrained(
        torch_model(base), str(workdir / "finetune" / "adapter")
    )
    theirs = logits(adapted)
    np.testing.assert_allclose(ours(adapters[0]), theirs, atol=1e-4)
    assert np.abs(theirs - ours(None)).max() > 1e-2


def test_the_merged_model_in_transformers_gives_our_logits(
    result, finished, adapters, ours, tmp_path
):
    pj.export_model(result, tmp_path / "m")
    np.testing.assert_allclose(ours(adapters[0]), logits(torch_model(tmp_path / "m")), atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "user : w3 w7 assistant sure"
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(finished[0])(text).input_ids
    assert tokenizer.chat_template
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"] == 1


def test_export_model_without_epsilon(result, ours, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        pj.export_model(result, tmp_path / "m", without_epsilon=True)
    assert "MORE harmful" in caplog.text
    np.testing.assert_allclose(ours(result.params), logits(torch_model(tmp_path / "m")), atol=1e-4)


def test_full_parameters_export_a_model_that_transformers_loads(tmp_path_factory, ours):
    """model/ = w + ε, exactly, tensor by tensor; its logits are ours."""
    _place, workdir = runs.finished_full_run(tmp_path_factory)
    folder = workdir / "finetune"
    arrays, notes = read_checkpoint(folder / "checkpoints" / str(runs.STEPS))
    assert "lora_scale" not in notes
    deployed, epsilon = (
        load_file(folder / n) for n in ("model/model.safetensors", "epsilon.safetensors")
    )
    q = arrays["params.layers.self_attn.q_proj.kernel"]
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        np.testing.assert_array_equal(deployed[name], q[layer].T + epsilon[name])
    np.testing.assert_array_equal(
        deployed["model.norm.weight"], arrays["params.norm.scale"] + epsilon["model.norm.weight"]
    )
    np.testing.assert_array_equal(
        deployed["lm_head.weight"], arrays["params.lm_head.kernel"].T + epsilon["lm_head.weight"]
    )
    loaded = pj.load(folder / "model", dtype="float32")
    theirs = logits(torch_model(folder / "model"))
    np.testing.assert_allclose(ours(None, loaded.weights), theirs, atol=1e-4)
    assert np.abs(theirs - ours(None)).max() > 1e-2
    with pytest.raises(InputError, match="holds all parameters"):
        export.adapter_from_checkpoint(folder / "checkpoints" / str(runs.STEPS))
    with pytest.raises(InputError, match="use export_model"):
        pj.export_adapter(pj.Result(loaded, {}, None, {}, None, 1, (), 1), "never")


# ---------------------------------------------------------------- merging


@pytest.fixture
def half_base(finished, tmp_path):
    """The base in bfloat16."""
    torch_model(finished[0]).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / name).write_bytes((finished[0] / name).read_bytes())
    return tmp_path / "half"


def bare_adapter(adapters, folder):
    """w of the run as a PEFT folder that says nothing of ε."""
    export.save_adapter(adapters[2], folder, "base")
    return folder


@pytest.mark.parametrize("with_epsilon", [False, True])
def test_convert_merges_a_bfloat16_base_in_float32(
    adapters, finished, half_base, tmp_path, with_epsilon
):
    """Against NumPy: bf16(f32(W) + s (A B)ᵀ), each product summed in float32 in whatever order; every other tensor bit by bit."""
    _, epsilon, w = adapters
    folder = bare_adapter(adapters, tmp_path / "w")
    flags = [
        f"--config.model.path={half_base}",
        f"--config.lora.init_from={folder}",
        f"--out={tmp_path / 'out'}",
    ]
    if with_epsilon:
        flags.append(f"--epsilon={finished[1] / 'finetune' / 'epsilon.safetensors'}")
    assert panacea("convert", *flags) == 0
    before, after = (
        load_file(half_base / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    changed = 0
    for name, tensor in before.items():
        assert after[name].dtype == ml_dtypes.bfloat16 and after[name].shape == tensor.shape
        parts = name.split(".")
        pair = w.layers.get(parts[3], {}).get(parts[4]) if len(parts) > 4 else None
        if pair is None:
            np.testing.assert_array_equal(after[name].view(np.uint16), tensor.view(np.uint16))
            continue
        layer = int(parts[2])
        a, b = pair["a"][layer], pair["b"][layer]
        if with_epsilon:
            a, b = (
                a + epsilon[parts[3]][parts[4]]["a"][layer],
                b + epsilon[parts[3]][parts[4]]["b"][layer],
            )
        merged = (tensor.astype(np.float32) + np.float32(2.0) * (a @ b).T).astype(
            ml_dtypes.bfloat16
        )
        np.testing.assert_array_equal(
            after[name].view(np.uint16), merged.view(np.uint16), err_msg=name
        )
        changed += int(np.any(merged != tensor))
    assert changed == 3 * 2  # q, v and down of two layers
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype") == "bfloat16"
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    )


def test_convert_of_w_and_epsilon_is_convert_of_what_was_deployed(
    adapters, finished, tmp_path, capsys
):
    base, workdir = finished
    folder = bare_adapter(adapters, tmp_path / "w")
    epsilon = workdir / "finetune" / "epsilon.safetensors"
    common = [f"--config.model.path={base}"]
    assert (
        panacea(
            "convert",
            *common,
            f"--config.lora.init_from={folder}",
            f"--epsilon={epsilon}",
            f"--out={tmp_path / 'a'}",
        )
        == 0
    )
    assert capsys.readouterr().out.strip().endswith("a")
    assert (
        panacea(
            "convert",
            *common,
            f"--config.lora.init_from={workdir / 'finetune' / 'adapter'}",
            f"--out={tmp_path / 'b'}",
        )
        == 0
    )
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_convert_without_an_adapter_copies_the_base(finished, tmp_path):
    assert panacea("convert", f"--config.model.path={finished[0]}", f"--out={tmp_path / 'c'}") == 0
    before, after = (load_file(f / "model.safetensors") for f in (finished[0], tmp_path / "c"))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_a_model_without_a_folder_of_origin_cannot_be_exported(result, tmp_path):
    homeless = dataclasses.replace(result, model=dataclasses.replace(result.model, folder=None))
    with pytest.raises(InputError, match="did not come from a Hugging Face folder"):
        pj.export_model(homeless, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# ---------------------------------------------------------------- ε on its own


def test_epsilon_file(finished, adapters):
    path = finished[1] / "finetune" / "epsilon.safetensors"
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {
            "kind": "last",
            "defence": "panacea",
            "rank": "2",
            "alpha": "4.0",
        }
        names = set(file.keys())
    assert names == set(load_file(finished[1] / "finetune" / WEIGHTS))
    with safe_open(path.with_name("epsilon_mean.safetensors"), "numpy") as file:
        assert file.metadata()["kind"] == "mean"


def test_epsilon_round_trip(adapters, model, tmp_path):
    """Adapter and weight trees come back as they went."""
    deployed, _epsilon, _ = adapters
    export.save_epsilon(deployed, tmp_path / "e.safetensors", {})
    jax.tree.map(
        np.testing.assert_array_equal,
        export.load_epsilon(tmp_path / "e.safetensors"),
        deployed.layers,
    )
    export.save_epsilon(model.weights, tmp_path / "f.safetensors", {})
    jax.tree.map(
        np.testing.assert_array_equal,
        export.load_epsilon(tmp_path / "f.safetensors"),
        model.weights,
    )


def test_load_epsilon_refuses_other_files(tmp_path):
    good = "base_model.model.model.layers.{}.mlp.up_proj.lora_A.weight"
    for tensors, wanted in (
        ({}, "holds no tensor"),
        ({"vision.weight": (2, 3)}, "vision.weight is not a tensor of an exported ε"),
        ({good.format("x"): (2, 3)}, "is not a tensor of an exported ε"),
        ({good.format(1): (2, 3)}, "up_proj/a: a layer is missing"),
        (
            {good.format(0): (2, 3), good.format(1): (2, 4)},
            "up_proj/a: a layer is missing, or its shape differs",
        ),
    ):
        save_file(
            {n: np.zeros(s, np.float32) for n, s in tensors.items()}, tmp_path / "e.safetensors"
        )
        with pytest.raises(InputError, match=wanted):
            export.load_epsilon(tmp_path / "e.safetensors")
    with pytest.raises(InputError, match="none.safetensors"):
        export.load_epsilon(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        export.load_epsilon(tmp_path)


def test_a_checkpoint_of_sft_has_no_epsilon(finished):
    with pytest.raises(InputError, match="holds no ε"):
        from_checkpoint(finished[1] / "align" / "checkpoints" / "3")
