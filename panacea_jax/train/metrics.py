"""Where the numbers of a run go: ``metrics.jsonl``, and the trackers that the configuration names."""

import functools
import json
import math
import statistics
from pathlib import Path
from typing import Any

from panacea_jax.errors import InputError
from panacea_jax.train.trackers import TRACKERS, Background, Tracking
from panacea_jax.workdir import write_text

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """One JSON line per logged step, which every tracker is told too.

    On resume, lines after the resumed step are dropped first, so that the file reads as if the run had never stopped.
    """

    def __init__(self, folder: Path, start_step: int = 0, tracking: Tracking | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        kept = [line for line in _lines(path) if _row(path, line)["step"] <= start_step]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        tracking = tracking or Tracking()
        self._trackers = [
            Background(name, functools.partial(TRACKERS[name], folder, tracking, start_step > 0))
            for name in tracking.to
        ]

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Log one step; values that are not finite become ``null`` in JSON and are left out of what trackers are told."""
        finite = {k: v for k, v in scalars.items() if math.isfinite(v)}
        row = {"step": step, **{k: finite.get(k) for k in scalars}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(step, finite)

    def close(self) -> None:
        """Flush and close the file and every tracker."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What was logged in a stage's folder, a dictionary a step; none where nothing was."""
    path = folder / METRICS_FILE
    return [_row(path, line) for line in _lines(path)]


def _row(path: Path, line: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
        row["step"] + 0
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged: a line is no record of a step ({type(error).__name__})") from error
    return row


def _lines(path: Path) -> list[str]:
    """Complete lines of a JSON lines file; a torn last one is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def seconds_of_steps(folder: Path, steps: int) -> float | None:
    """Steps times their median duration over the logged stretches; the first stretch, which compiles, does not count.

    Args:
        folder: of the stage.
        steps: how many it took.
    """
    # Of steps only: losses on held-out records have lines of their own.
    found = [row["step_seconds"] for row in read_metrics(folder) if "step_seconds" in row][1:]
    return steps * statistics.median(found) if found else None
