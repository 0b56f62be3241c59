"""`panacea sweep` on the tiny model."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.runs import make_place, panacea

FEW = ("--config.train.steps=2", "--config.checkpoint.every=0")
OVER = ("--over", "defence.rho=0.25,0.5", "defence.lam=0.1,0.3")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    root = tmp_path_factory.mktemp("swept")
    place = make_place(root / "place")
    assert panacea("sweep", *place.flags(*FEW), *OVER, f"--workdir={root / 'out'}") == 0
    return place, root / "out"


def test_each_run_is_what_panacea_run_makes_of_its_configuration(swept, tmp_path):
    place, out = swept
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [list(row["setting"].values()) for row in rows] == [[0.25, 0.1], [0.25, 0.3], [0.5, 0.1], [0.5, 0.3]]
    assert len(list((out / "runs").glob("*/manifest.json"))) == 4
    alone = ("--config.defence.rho=0.25", "--config.defence.lam=0.3")
    assert panacea("run", *place.flags(*FEW, *alone), f"--workdir={tmp_path}") == 0
    found = out / rows[1]["folders"]["0"]
    weights = "finetune/adapter/adapter_model.safetensors"
    ours, theirs = load_file(found / weights), load_file(tmp_path / weights)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)
    scores, figures = json.loads((tmp_path / "scores.json").read_text()), rows[1]["figures"]
    assert json.loads((found / "scores.json").read_text()) == scores
    assert figures["hs"]["mean"] == scores["hs"] and figures["hs"]["ci95"] == pytest.approx(scores["ci95"]["hs"])
    assert figures["fa"]["mean"] == scores["fa"]["pairs"] and figures["benign"]["mean"] == scores["answered"]
    assert rows[1]["passes"] == 2 * 3 and rows[1]["step_bytes"] > 0  # two steps: task, harmful twice


def test_a_finished_sweep_trains_nothing(swept, monkeypatch):
    place, out = swept
    monkeypatch.setattr("panacea_jax.sweep.run.run_stages", None)
    assert panacea("sweep", *place.flags(*FEW), *OVER, f"--workdir={out}") == 0


@pytest.mark.parametrize("asked", ["--list", "--list=true"])
def test_the_list_has_a_command_a_run(asked, swept, capsys, monkeypatch):
    place, out = swept
    command = ["sweep", *place.flags(*FEW), *OVER, f"--workdir={out}", asked]
    monkeypatch.setattr(sys, "argv", ["/somewhere/panacea", *command])
    assert panacea(*command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  # ")[2] for line in lines] == [f"defence.rho={r},defence.lam={x}" for r in (0.25, 0.5) for x in (0.1, 0.3)]
    assert all(line.startswith("panacea sweep ") and f" --index={i}  #" in line for i, line in enumerate(lines, 1))
    assert "--list" not in lines[0] and "'--config.eval.tasks=(" in lines[0]  # quoted for a shell


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--over=defence.roh=1,2"], "did you mean --config.defence.rho?"),
        (["--over=defence.rho=0..1"], "config.sweep.over = 'defence.rho': a grid has to know"),
        (["--over=defence.rho=1..2", "--sampler=tpe"], "config.sweep.trials = 0: tpe draws"),
        (["--over=defence.rho=1,-2"], "config.sweep.over: defence.rho=-2.0: config.defence.rho = -2.0"),
        (["--over=defence.rho=1,2", "--config.data.harmful=pairs@nowhere.jsonl"], "nowhere.jsonl"),
        ([], "config.sweep.over is empty"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(swept, flags, said, tmp_path, capsys):
    assert panacea("sweep", *swept[0].flags(*flags), f"--workdir={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_run_does_not_forget_that_it_was_to_be_a_sweep(swept, tmp_path, capsys):
    flags = swept[0].flags("--config.sweep.over=('seed=0,1',)")
    assert panacea("run", *flags, f"--workdir={tmp_path / 'out'}") == 2
    assert "config.sweep.over: many runs; start `panacea sweep`" in capsys.readouterr().err


def test_flags_take_the_place_of_keys_before_these_are_looked_at(swept, capsys, monkeypatch):
    """A range that a grid could not go over is drawn from, and a grid has no number of draws."""
    monkeypatch.setattr(sys, "argv", ["panacea", "sweep"])
    drawn = ("--config.sweep.over=('defence.rho=0.1..2',)", "--sampler=random", "--trials=2", "--list")
    assert panacea("sweep", *swept[0].flags(*drawn)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    keys = ("--config.sweep.over=('defence.rho=0.1,1,2',)", "--config.sweep.sampler=random", "--config.sweep.trials=2")
    assert panacea("sweep", *swept[0].flags(*keys), "--sampler=grid", "--trials=0", "--list") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_runs_of_other_records_do_not_stand_beside_new_ones(swept, capsys):
    place, out = swept
    path = place.root / "user.jsonl"
    before, table = path.read_bytes(), (out / "sweep.json").read_bytes()
    path.write_bytes(before + before)
    try:
        assert panacea("sweep", *place.flags(*FEW), OVER[0], "defence.rho=0.25,0.5,1", OVER[2], f"--workdir={out}") == 2
    finally:
        path.write_bytes(before)
    assert f"made by another run (input pairs@{path}: " in capsys.readouterr().err
    assert (out / "sweep.json").read_bytes() == table
