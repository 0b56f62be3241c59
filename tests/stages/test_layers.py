"""Layer coefficients are the same from the live state, from a checkpoint and from the exported file; the command `layers`."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest

from panacea_jax.analysis.layers import layer_coefficients
from panacea_jax.data.batches import Stream
from panacea_jax.data.encode import Example
from panacea_jax.defences import Panacea
from panacea_jax.export import load_epsilon, save_epsilon
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.stages import layers as stage
from panacea_jax.train.checkpoints import Checkpoints, read_checkpoint
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests import runs
from tests.runs import panacea


def streams():
    """Records of one bucket, so that the step is compiled once."""
    rng = np.random.default_rng(0)
    return {
        name: Stream(
            name,
            [Example.answering(rng.integers(0, 40, 12).astype(np.int32), 4) for _ in range(6)],
            4,
            0,
            True,
            (12,),
        )
        for name in ("user", "harmful")
    }


@pytest.fixture(scope="module", params=["lora", "full"])
def trained(request, tmp_path_factory):
    """A run of three steps in this process: its Result, and the folder with its checkpoint and ε files."""
    folder = tmp_path_factory.mktemp(f"live_{request.param}")
    place = runs.make_place(folder / "place")
    model = load(place.base, dtype="float32")
    if request.param == "full":
        model, params = full_parameters(model)
    else:
        params = lora.init(model, 2, 4, runs.ADAPTED, key=jax.random.key(0))
    # The last step is due for saving, and ε is recomputed after it: the checkpoint must hold the final one.
    checkpoints = Checkpoints(folder / "checkpoints", every=3)
    defence = Panacea(rho=0.5, lam=0.3, final_epsilon="mean")
    result = finetune(
        model,
        params,
        defence,
        streams(),
        optimizer=make_optimizer(1e-2),
        steps=3,
        checkpoints=checkpoints,
    )
    save_epsilon(result.epsilon, folder / "epsilon.safetensors", {})
    save_epsilon(result.state.epsilon_mean, folder / "epsilon_mean.safetensors", {})
    return result, folder


def live(result):
    """Straight from the live state: the last ε with w, and the mean ε."""
    w = result.params if isinstance(result.params, lora.Adapter) else None
    return [
        layer_coefficients(result.epsilon, w, kind="last"),
        layer_coefficients(result.state.epsilon_mean, w, kind="mean"),
    ]


def assert_same(a, b, *, effective):
    assert a["epsilon"] == b["epsilon"] and len(a["layers"]) == len(b["layers"]) == 2
    for x, y in zip(a["layers"], b["layers"]):
        for key in ("norm", "share", "density"):
            assert x[key] == pytest.approx(y[key], rel=1e-12) and x[key] > 0
        assert x["modules"].keys() == y["modules"].keys()
        for name, figures in x["modules"].items():
            assert figures == pytest.approx(y["modules"][name], rel=1e-12)
        if effective:
            assert x["effective"] == pytest.approx(y["effective"], rel=1e-12) and x["effective"] > 0
    assert sum(x["share"] for x in a["layers"]) == pytest.approx(1)
    assert (a["outside"] is None) == (b["outside"] is None)
    if a["outside"]:
        assert a["outside"]["norm"] == pytest.approx(b["outside"]["norm"], rel=1e-12)


def test_live_state_checkpoint_and_file_agree(trained):
    result, folder = trained
    from_state = live(result)
    from_checkpoint = stage.from_checkpoint(folder / "checkpoints" / "3")
    with_adapter = isinstance(result.params, lora.Adapter)
    assert [r["epsilon"] for r in from_checkpoint] == ["last", "mean"]
    for a, b in zip(from_state, from_checkpoint):
        assert_same(a, b, effective=with_adapter)
    for kind, suffix, expected in (("last", "", from_state[0]), ("mean", "_mean", from_state[1])):
        exported = layer_coefficients(
            load_epsilon(folder / f"epsilon{suffix}.safetensors"), kind=kind
        )
        assert_same(expected, exported, effective=False)
    assert from_state[0]["layers"][0]["norm"] != pytest.approx(
        from_state[1]["layers"][0]["norm"], rel=1e-3
    )


def test_the_numbers_are_those_of_numpy(trained):
    """Norm, share and density of layer 1 of the checkpoint, by hand."""
    result, folder = trained
    arrays, _ = read_checkpoint(folder / "checkpoints" / "3")
    prefix = "defence.epsilon.layers."
    epsilon = {k: v.astype(np.float64) for k, v in arrays.items() if k.startswith(prefix)}
    assert len(epsilon) == (6 if isinstance(result.params, lora.Adapter) else 9)
    squares = [sum(float((v[layer] ** 2).sum()) for v in epsilon.values()) for layer in (0, 1)]
    entries = sum(v[0].size for v in epsilon.values())
    row = stage.from_checkpoint(folder / "checkpoints" / "3")[0]["layers"][1]
    assert row["norm"] == pytest.approx(np.sqrt(squares[1]))
    assert row["share"] == pytest.approx(squares[1] / sum(squares))
    assert row["density"] == pytest.approx(np.sqrt(squares[1] / entries))
    if isinstance(result.params, lora.Adapter):
        total = 0.0
        for block, name in (("self_attn", "q_proj"), ("self_attn", "v_proj"), ("mlp", "down_proj")):
            a, b = (arrays[f"params.layers.{block}.{name}.{k}"][1].astype(np.float64) for k in "ab")
            ea, eb = (arrays[f"{prefix}{block}.{name}.{k}"][1].astype(np.float64) for k in "ab")
            total += np.sum((2.0 * ((a + ea) @ (b + eb) - a @ b)) ** 2)
        assert row["effective"] == pytest.approx(np.sqrt(total), rel=1e-6)
    else:
        assert row["effective"] is None


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return runs.finished_run(tmp_path_factory)[1]


def objects(path):
    content = json.loads(path.read_text())
    return content if isinstance(content, list) else [content]


def test_layers_of_a_work_directory_a_checkpoint_and_a_file(workdir, tmp_path, capsys):
    """The three sources of the command write the same figures; each prints where."""
    newest = workdir / "finetune" / "checkpoints" / str(runs.STEPS)
    epsilon = workdir / "finetune" / "epsilon.safetensors"
    for name, source in (("c", f"--checkpoint={newest}"), ("e", f"--epsilon={epsilon}")):
        assert panacea("layers", source, f"--workdir={tmp_path / name}") == 0
        assert capsys.readouterr().out.strip().endswith(f"{name}/layers.json")
        assert {p.name for p in (tmp_path / name).iterdir()} == {
            "layers.json",
            "layers.csv",
            "layers.png",
        }
    of_run, of_checkpoint, of_file = (
        objects(p / "layers.json") for p in (workdir, tmp_path / "c", tmp_path / "e")
    )
    assert of_run == of_checkpoint and len(of_run) == 2 and len(of_file) == 1
    assert_same(of_run[0], of_file[0], effective=False)
    assert of_file[0]["layers"][0]["effective"] is None and of_run[0]["layers"][0]["effective"] > 0
    with (tmp_path / "e" / "layers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and {"layer", "share"} <= rows[0].keys()


def test_layers_go_beside_the_source_without_a_work_directory(workdir, tmp_path):
    shutil.copy(workdir / "finetune" / "epsilon.safetensors", tmp_path / "e.safetensors")
    assert panacea("layers", f"--epsilon={tmp_path / 'e.safetensors'}") == 0
    assert (tmp_path / "layers.json").is_file()


def test_without_checkpoints_the_exported_files_are_read(workdir, tmp_path):
    (tmp_path / "finetune").mkdir()
    for name in ("epsilon.safetensors", "epsilon_mean.safetensors"):
        shutil.copy(workdir / "finetune" / name, tmp_path / "finetune" / name)
    found, wanted = stage.from_workdir(tmp_path), stage.from_workdir(workdir)
    for a, b in zip(wanted, found, strict=True):
        assert_same(a, b, effective=False)


def test_all_parameters_have_figures_outside_the_layers(tmp_path_factory):
    _, workdir = runs.finished_full_run(tmp_path_factory)
    last, mean = objects(workdir / "layers.json")
    for kind in (last, mean):
        assert set(kind["outside"]["modules"]) == {"embed_tokens", "norm", "lm_head"}
        assert sum(row["share"] for row in kind["layers"]) == pytest.approx(1)
        assert {"q_proj", "down_proj", "input_layernorm"} <= kind["layers"][0]["modules"].keys()
    squares = sum(row["norm"] ** 2 for row in last["layers"]) + last["outside"]["norm"] ** 2
    assert np.sqrt(squares) == pytest.approx(runs.RHO, rel=1e-5)
