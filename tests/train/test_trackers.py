"""Metrics beside metrics.jsonl: what each tracker is told, and that none of them can stop or hold up a run."""

import importlib.machinery
import json
import logging
import sys
import threading
import types

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from panacea_jax.train import trackers
from panacea_jax.train.loss_picture import plot_losses
from panacea_jax.train.metrics import MetricsWriter, read_metrics
from panacea_jax.train.trackers import Tracking
from tests.runs import make_place, panacea

STEPS = [(1, {"loss": 2.5, "norm_g": 0.5}), (2, {"loss": 1.5, "norm_g": float("nan")}), (3, {"loss": 1.25, "norm_g": 0.25})]
SETTINGS = {"defence.name": "panacea", "lora.targets": ["q", "v"]}


def write(folder, *to, start=0, steps=STEPS):
    writer = MetricsWriter(folder, start, Tracking(to, "mine", SETTINGS))
    for step, scalars in steps:
        writer.write(step, scalars)
    writer.close()
    return [row["loss"] for row in read_metrics(folder)]


def test_tensorboard_has_what_the_lines_have(tmp_path):
    losses = write(tmp_path, "tensorboard")
    [file] = tmp_path.glob("events.out.tfevents.*")
    events = [e for e in EventFileLoader(str(file)).Load() if e.HasField("summary")]
    found = [{v.tag: np.float32(v.tensor.float_val[0]) for v in e.summary.value} for e in events]
    assert [e.step for e in events] == [1, 2, 3]
    assert [f["loss"] for f in found] == losses == [2.5, 1.5, 1.25]
    assert [f.get("norm_g") for f in found] == [0.5, None, 0.25]  # NaN is left out


# ---------------------------------------------------------------- what goes wrong


class Broken:
    """Fails, or waits for ever, where it is told to."""

    def __init__(self, where, how):
        self.where, self.how, self.asked = where, how, []

    def __call__(self, folder, tracking, resumed):
        self._maybe("begin")
        return self

    def log(self, step, scalars):
        self._maybe("log")

    def close(self):
        self._maybe("close")

    def _maybe(self, where):
        self.asked.append(where)
        if where == self.where:
            self.how()


def refuse():
    raise RuntimeError("no way to https://me:hunter2222@host, key sesame-open-sesame\nand more")


@pytest.mark.parametrize("where", ["begin", "log", "close"])
def test_a_tracker_that_fails_is_one_warning(where, tmp_path, monkeypatch, caplog):
    broken = Broken(where, refuse)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", broken)
    monkeypatch.setenv("WANDB_API_KEY", "sesame-open-sesame")
    with caplog.at_level(logging.WARNING):
        assert write(tmp_path, "wandb", "tensorboard") == [2.5, 1.5, 1.25]
    [warning] = [r.getMessage() for r in caplog.records]
    assert warning.startswith("tracker wandb: RuntimeError: no way to https://…@host, key …; the run goes on")
    assert "hunter" not in warning and "sesame" not in warning and "\n" not in warning
    assert broken.asked.count(where) == 1  # not asked again
    assert list(tmp_path.glob("events.out.tfevents.*"))  # the other one is not concerned


def test_a_tracker_that_hangs_holds_nothing_up(tmp_path, monkeypatch, caplog):
    never = threading.Event()
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Broken("begin", never.wait))
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    with caplog.at_level(logging.WARNING):
        assert write(tmp_path, "wandb") == [2.5, 1.5, 1.25]
    never.set()
    assert [r.getMessage() for r in caplog.records] == ["tracker wandb: does not answer; the run goes on without it, metrics.jsonl has all"]


def test_a_package_that_is_missing_is_said_before_anything_is_made(tmp_path, monkeypatch, capsys):
    place = make_place(tmp_path / "place")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    flags = place.flags("--config.track.to=('tensorboard','wandb')")
    assert panacea("finetune", *flags, f"--workdir={tmp_path / 'out'}") == 2
    assert "config.track.to: tensorboard is not installed; pip install 'panacea_jax[" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_tracker_is_refused(tmp_path, capsys):
    assert panacea("finetune", "--config.track.to=('comet',)", f"--workdir={tmp_path}") == 2
    assert "config.track.to = 'comet': one of tensorboard, wandb, mlflow" in capsys.readouterr().err


# ---------------------------------------------------------------- Weights & Biases


class FakeRun:
    def __init__(self, **given):
        self.given, self.id, self.rows, self.finished = given, given["id"], [], False

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module of that name, and the runs that it began."""
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.runs, fake.Settings = [], lambda **settings: settings
    fake.init = lambda **given: fake.runs.append(FakeRun(**given)) or fake.runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake.runs


def test_wandb_is_told_every_step(wandb, tmp_path):
    folder = tmp_path / "run" / "finetune"
    write(folder, "wandb")
    [run] = wandb
    assert run.rows == [(1, STEPS[0][1]), (2, {"loss": 1.5}), (3, STEPS[2][1])] and run.finished
    given = run.given
    assert (given["project"], given["name"], given["dir"]) == ("mine", "run/finetune", str(folder))
    assert given["config"] == SETTINGS and given["settings"]["console"] == "off"


def test_a_resumed_run_is_the_same_wandb_run_and_one_begun_anew_is_not(wandb, tmp_path):
    write(tmp_path, "wandb")
    write(tmp_path, "wandb", start=2, steps=STEPS[2:])
    write(tmp_path, "wandb")
    ids = [run.id for run in wandb]
    assert ids[0] == ids[1] != ids[2] and all(run.given["resume"] == "allow" for run in wandb)


def test_a_training_run_reaches_its_tracker(wandb, tmp_path):
    """From the command line: the same numbers as in metrics.jsonl, the settings, and the picture."""
    place, out = make_place(tmp_path / "place"), tmp_path / "out"
    flags = place.flags("--config.track.to=('wandb',)", "--config.track.project=services", "--config.train.steps=2")
    assert panacea("finetune", *flags, f"--workdir={out}") == 0
    [run] = wandb
    rows = [json.loads(line) for line in (out / "finetune" / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **row} for step, row in run.rows] == rows and len(rows) == 2
    assert run.given["project"] == "services" and run.given["config"]["lora.rank"] == 2
    assert not list((out / "finetune").glob("events*"))
    with Image.open(out / "finetune" / "loss.png") as picture:
        assert picture.size == (840, 480)


def test_the_real_wandb_offline(tmp_path, monkeypatch):
    real = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, "wandb")
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert (tmp_path / "wandb.id").read_text().strip() in file.name
    kept = file.read_bytes()
    assert real.run is None and all(text in kept for text in (b"loss", b"norm_g", b"2.5", b"1.25", b"defence.name"))


# ---------------------------------------------------------------- MLflow


@pytest.fixture
def mlflow(monkeypatch):
    """A module of that name with a client that keeps everything in a dictionary of runs."""

    class Client:
        def get_experiment_by_name(self, name):
            return types.SimpleNamespace(experiment_id=name) if name in fake.experiments else None

        def create_experiment(self, name):
            fake.experiments.append(name)
            return name

        def create_run(self, experiment, run_name):
            fake.runs.append({"experiment": experiment, "name": run_name, "metrics": [], "params": [], "status": "RUNNING"})
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=str(len(fake.runs) - 1)))

        def update_run(self, run_id, status):
            fake.runs[int(run_id)]["status"] = status

        def log_batch(self, run_id, metrics=(), params=()):
            assert len(params) <= 100
            fake.runs[int(run_id)]["metrics"] += [(m.key, m.value, m.step) for m in metrics]
            fake.runs[int(run_id)]["params"] += [(p.key, p.value) for p in params]

        def set_terminated(self, run_id):
            fake.runs[int(run_id)]["status"] = "FINISHED"

    fake = types.ModuleType("mlflow")
    fake.experiments, fake.runs, fake.MlflowClient = [], [], Client
    fake.entities = types.SimpleNamespace(
        Param=lambda key, value: types.SimpleNamespace(key=key, value=value),
        Metric=lambda key, value, timestamp, step: types.SimpleNamespace(key=key, value=value, step=step),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


LOGGED = [("loss", 2.5, 1), ("norm_g", 0.5, 1), ("loss", 1.5, 2), ("loss", 1.25, 3), ("norm_g", 0.25, 3)]


def test_mlflow_is_told_every_step_also_of_a_run_that_goes_on(mlflow, tmp_path):
    write(tmp_path, "mlflow", steps=STEPS[:2])
    write(tmp_path, "mlflow", start=2, steps=STEPS[2:])
    [run] = mlflow.runs
    assert run["metrics"] == LOGGED and run["status"] == "FINISHED" and run["experiment"] == "mine"
    assert run["params"] == [("defence.name", "panacea"), ("lora.targets", "['q', 'v']")]
    write(tmp_path, "mlflow")
    assert len(mlflow.runs) == 2 and mlflow.experiments == ["mine"]


def test_the_real_mlflow_in_files(tmp_path, monkeypatch):
    real = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    write(tmp_path / "run", "mlflow", steps=STEPS[:2])
    write(tmp_path / "run", "mlflow", start=2, steps=STEPS[2:])
    client = real.MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (tmp_path / "run" / "mlflow.id").read_text().strip() == run.info.run_id and run.info.status == "FINISHED"
    found = {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in ("loss", "norm_g")}
    assert found == {"loss": [(1, 2.5), (2, 1.5), (3, 1.25)], "norm_g": [(1, 0.5), (3, 0.25)]}
    assert run.data.params == {"defence.name": "panacea", "lora.targets": "['q', 'v']"}


# ---------------------------------------------------------------- the picture


def test_the_picture_is_of_every_loss_that_was_logged(tmp_path, monkeypatch):
    drawn = {}
    from matplotlib.axes import Axes

    monkeypatch.setattr(Axes, "plot", lambda self, x, y, label, **_: drawn.update({label: list(zip(x, y))}))
    monkeypatch.setattr(Axes, "legend", lambda self, **_: None)
    writer = MetricsWriter(tmp_path, 0, Tracking(()))
    writer.write(1, {"loss": 2.0, "harmful_loss": 3.0, "norm_g": 9.0})
    writer.write(2, {"loss": float("nan"), "harmful_loss": 2.0})
    writer.write(3, {"loss": 1.0, "validation_loss": 4.0})
    writer.close()
    plot_losses(tmp_path)
    assert drawn == {"loss": [(1, 2.0), (3, 1.0)], "harmful loss": [(1, 3.0), (2, 2.0)], "validation loss": [(3, 4.0)]}
    assert next(iter(drawn)) == "loss" and (tmp_path / "loss.png").is_file()


def test_no_picture_where_nothing_was_logged(tmp_path):
    plot_losses(tmp_path)
    assert not (tmp_path / "loss.png").exists()
