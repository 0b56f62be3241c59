"""Where the numbers of a run go: ``metrics.jsonl`` and TensorBoard events beside it."""

import json
import math
import statistics
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class MetricsWriter:
    """One JSON line and one TensorBoard event per logged step.

    On resume, lines after the resumed step are dropped first, so that the file reads as if the run had never stopped.
    """

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start_step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._events = EventFileWriter(str(folder))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Log one step; values that are not finite become ``null`` in JSON and are left out of TensorBoard."""
        finite = {k: v for k, v in scalars.items() if math.isfinite(v)}
        row = {"step": step, **{k: finite.get(k) for k in scalars}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        values = [Summary.Value(tag=k, simple_value=v) for k, v in finite.items()]
        self._events.add_event(
            Event(step=step, wall_time=time.time(), summary=Summary(value=values))
        )

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._events.close()


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
    rows = map(json.loads, _lines(folder / "metrics.jsonl"))
    found = [row["step_seconds"] for row in rows if "step_seconds" in row][1:]
    return steps * statistics.median(found) if found else None
