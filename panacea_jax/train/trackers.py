"""Where the metrics of a run go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow.

Each works in a thread of its own, so that training neither waits for a server nor ends with it. Keys and addresses are for the trackers'
own libraries to find in the environment (WANDB_API_KEY, MLFLOW_TRACKING_URI, …); none passes through here.
"""

import dataclasses
import importlib.util
import queue
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from absl import logging

from panacea_jax.errors import InputError, without_secrets

# Seconds that the end of a stage waits for a tracker to send what is left.
PATIENCE = 30.0
# Parameters that an MLflow server takes at once.
_AT_ONCE = 100


@dataclasses.dataclass(frozen=True)
class Tracking:
    """What trackers are told of a run.

    Attributes:
        to: names of ``TRACKERS``.
        project: of Weights & Biases, or experiment of MLflow, that the run belongs to.
        settings: configuration keys and their values.
    """

    to: Collection[str] = ("tensorboard",)
    project: str = "panacea"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Tracker(Protocol):
    """Takes the numbers of a run, step by step."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take one step's, all finite."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Event files in the stage's folder."""

    def __init__(self, folder: Path, tracking: Tracking, resumed: bool) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events = EventFileWriter(str(folder))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """One event."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=k, simple_value=v) for k, v in scalars.items()]
        self._events.add_event(
            Event(step=step, wall_time=time.time(), summary=Summary(value=values))
        )

    def close(self) -> None:
        """Flush."""
        self._events.close()


class WeightsAndBiases:
    """A run of the W&B project, whose files lie in the stage's folder; WANDB_MODE=offline keeps it there."""

    def __init__(self, folder: Path, tracking: Tracking, resumed: bool) -> None:
        import wandb

        known = _known_id(folder, "wandb") if resumed else ""
        self._run = wandb.init(
            project=tracking.project, name=_run_name(folder), id=known or secrets.token_hex(8), resume="allow", dir=str(folder),
            config=dict(tracking.settings), settings=wandb.Settings(console="off", silent=True, save_code=False),
        )  # fmt: skip
        _note_id(folder, "wandb", self._run.id)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """One row."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """A run of the MLflow experiment, where MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path, tracking: Tracking, resumed: bool) -> None:
        import mlflow

        self._entities, self._client = mlflow.entities, mlflow.MlflowClient()
        self._id = _known_id(folder, "mlflow") if resumed else ""
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(tracking.project)
        experiment = found.experiment_id if found else self._client.create_experiment(tracking.project)
        self._id = self._client.create_run(experiment, run_name=_run_name(folder)).info.run_id
        _note_id(folder, "mlflow", self._id)
        params = [self._entities.Param(key, str(value)) for key, value in tracking.settings.items()]
        for first in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self._id, params=params[first : first + _AT_ONCE])

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """One batch of metrics."""
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(k, v, now, step) for k, v in scalars.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Finish the run."""
        self._client.set_terminated(self._id)


# A tracker is made of the stage's folder, what it is told of the run, and whether the run goes on from a checkpoint.
TRACKERS: Mapping[str, Callable[[Path, Tracking, bool], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow,
}  # fmt: skip


def check_installed(names: Collection[str]) -> None:
    """That the packages of these trackers are there.

    Raises:
        InputError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"config.track.to: {name} is not installed; pip install 'panacea_jax[{name}]', or leave it out")


class Background:
    """A tracker in a thread of its own. What goes wrong there is one warning, after which it is told nothing more."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        """
        Args:
            name: for the warning.
            make: makes the tracker, which may wait for a server already.
        """
        self._name = name
        self._waiting: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(make,), name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Hand on one step's numbers, without a wait."""
        if self._thread.is_alive():
            self._waiting.put((step, scalars))

    def close(self) -> None:
        """Let the tracker end, for ``PATIENCE`` seconds at most."""
        self._waiting.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            logging.warning("tracker %s: does not answer; the run goes on without it, metrics.jsonl has all", self._name)

    def _work(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()
            while (row := self._waiting.get()) is not None:
                tracker.log(*row)
            tracker.close()
        except Exception as error:  # whatever a library of others raises
            said = without_secrets(f"{type(error).__name__}: {error}".splitlines()[0])
            logging.warning("tracker %s: %s; the run goes on without it, metrics.jsonl has all", self._name, said)


def _run_name(folder: Path) -> str:
    """``WORKDIR/STAGE`` by the last part of the work directory's name."""
    return "/".join(folder.absolute().parts[-2:])


def _known_id(folder: Path, name: str) -> str:
    """The tracker's name for the run that goes on in a stage's folder; "" where none was noted."""
    file = folder / f"{name}.id"
    return file.read_text("utf-8").strip() if file.is_file() else ""


def _note_id(folder: Path, name: str, run_id: str) -> None:
    (folder / f"{name}.id").write_text(f"{run_id}\n", encoding="utf-8")
