"""Checkpoints of one run that answer too (`config.eval.every`)."""

import csv
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.runs import make_place, panacea

# ε of the whole harmful set after the last step: what no checkpoint holds.
WHOLE = "--config.defence.final_epsilon=mean"
FLAGS = (WHOLE, "--config.checkpoint.every=0", "--config.train.steps=6", "--config.eval.every=2")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    root = tmp_path_factory.mktemp("curve")
    place = make_place(root / "place")
    assert panacea("run", *place.flags(*FLAGS), f"--workdir={root / 'out'}") == 0
    return place, root / "out"


def test_each_point_is_what_a_run_of_so_many_steps_leaves(ran, tmp_path):
    place, out = ran
    assert panacea("run", *place.flags(*FLAGS[:2], "--config.train.steps=4"), f"--workdir={tmp_path}") == 0
    for name in ("adapter/adapter_model.safetensors", "epsilon.safetensors"):
        ours, theirs = (load_file(folder / "finetune" / name) for folder in (out / "steps" / "4", tmp_path))
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours), name
    scores = json.loads((tmp_path / "scores.json").read_text())
    point = json.loads((out / "curve.json").read_text())["points"][1]
    assert {name: point[name] for name in ("hs", "hs_plus", "fa", "over_refusal", "ci95")} == {
        name: scores[name] for name in ("hs", "hs_plus", "fa", "over_refusal", "ci95")
    }


def test_the_curve_has_steps_and_epochs_and_ends_with_the_run(ran):
    _, out = ran
    curve = json.loads((out / "curve.json").read_text())
    assert [(p["step"], p["epoch"]) for p in curve["points"]] == [(2, 2 / 3), (4, 4 / 3), (6, 2.0)]  # 12 records in batches of 4
    assert curve["steps_per_epoch"] == 3 and curve["judge"] == "refusal"
    scores = json.loads((out / "scores.json").read_text())
    assert curve["points"][-1]["hs"] == scores["hs"] and curve["points"][-1]["fa"] == scores["fa"]
    weights = "finetune/adapter/adapter_model.safetensors"
    ours, theirs = load_file(out / "steps" / "6" / weights), load_file(out / weights)
    assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)
    with (out / "curve.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == [2, 4, 6]
    assert [float(line["fa_pairs"]) for line in lines] == [p["fa"]["pairs"] for p in curve["points"]]
    assert sorted(int(p.name) for p in (out / "finetune" / "checkpoints").iterdir()) == [2, 4, 6]


def test_a_finished_curve_is_not_made_again(ran, monkeypatch):
    place, out = ran
    monkeypatch.setattr("panacea_jax.stages.curve.open_stage", None)
    before = (out / "curve.json").read_bytes()
    assert panacea("run", *place.flags(*FLAGS), f"--workdir={out}") == 0
    assert (out / "curve.json").read_bytes() == before


def test_a_finished_run_can_be_asked_later_for_what_it_kept(ran, tmp_path, monkeypatch, capsys):
    place, out = ran
    shutil.copytree(out / "finetune", tmp_path / "finetune")
    monkeypatch.setattr("panacea_jax.stages.train._train", None)
    assert panacea("run", *place.flags(*FLAGS[:3], "--config.eval.every=4"), f"--workdir={tmp_path}") == 0
    points = json.loads((tmp_path / "curve.json").read_text())["points"]
    assert points == json.loads((out / "curve.json").read_text())["points"][1:]
    assert panacea("run", *place.flags(*FLAGS[:3], "--config.eval.every=-1"), f"--workdir={tmp_path}") == 2
    assert "checkpoints/3 was not kept" in capsys.readouterr().err  # an epoch is three steps


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.train.full_parameters=True", "config.eval.every = 2: config.train.full_parameters"),
        ("--config.generate.merge=True", "config.eval.every = 2: config.generate.merge"),
        ("--config.defence.rho=auto", "config.eval.every = 2: config.defence.rho = auto"),
        ("--config.eval.tasks=()", "config.eval.every = 2: config.eval.tasks is empty"),
        ("--config.eval.every=-2", "config.eval.every = -2: a number not below -1"),
    ],
)
def test_what_has_no_curve_is_refused_before_training(ran, flag, said, tmp_path, capsys):
    flags = [f for f in FLAGS if f.partition("=")[0] != flag.partition("=")[0]]
    assert panacea("run", *ran[0].flags(*flags, flag), f"--workdir={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_checkpoints_that_lie_in_a_store_alone_are_found(ran, tmp_path, monkeypatch):
    """As on gs://, where orbax writes them itself: below the local folder there are none."""
    place, out = ran
    here = out / "finetune" / "checkpoints"
    before = (out / "curve.json").read_bytes()
    monkeypatch.setattr("panacea_jax.stages.curve.open_stage", None)
    monkeypatch.setattr("panacea_jax.train.checkpoints.direct", lambda path: tmp_path / "store" / path.relative_to(here))
    here.rename(tmp_path / "store")
    try:
        assert panacea("run", *place.flags(*FLAGS), f"--workdir={out}") == 0
    finally:
        (tmp_path / "store").rename(here)
    assert (out / "curve.json").read_bytes() == before
