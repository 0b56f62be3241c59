"""The phases of a run: how long each took and what it warned of, kept in the work directory for a run that is stopped and goes on."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panacea_jax.errors import InputError
from panacea_jax.memory import forget_peak, peak_bytes
from panacea_jax.parallel import processes
from panacea_jax.progress import say
from panacea_jax.untrusted import parsing, read_object
from panacea_jax.workdir import MANIFEST, manifest_if_any, write_bytes, write_json

SUMMARY = "summary.json"
# What a phase leaves in the work directory once it has begun. One without is done anew each time.
MARKS = {
    **{name: f"{name}/{MANIFEST}" for name in ("align", "finetune", "heal", "perplexity")},
    "generate": f"generations/{MANIFEST}", "judge": "judgements",
}  # fmt: skip


@dataclasses.dataclass
class Phase:
    """One phase, over all calls that worked on it.

    Attributes:
        seconds: of the calls whose end was seen.
        calls: how many those are.
        lost: calls that were killed, so that their time is not known.
        before: it was done when this run began.
        warnings: how often each was given.
        spent: of a stage that trains, seconds by what they went to, over all calls up to their last checkpoint.
        peak_bytes: the most memory that a call took at a time, as far as it is known.
        peak_of: what took it: a device, or the process.
        open: a call is at work, or was when it was killed.
    """

    seconds: float = 0.0
    calls: int = 0
    lost: int = 0
    before: bool = False
    warnings: dict[str, int] = dataclasses.field(default_factory=dict)
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_bytes: int = 0
    peak_of: str = ""
    open: bool = False


class Phases:
    """``with phases("finetune"): …``; only the first process writes.

    Attributes:
        passed: those of this run, by name, in its order.
    """

    def __init__(self, workdir: Path) -> None:
        """
        Raises:
            InputError: its summary is not one of ours.
        """
        self._workdir = workdir
        self.passed: dict[str, Phase] = {}
        self._known = _read(workdir / SUMMARY)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Announce a phase and keep account of it. One that is done already keeps the account that it has; bad input changes none."""
        say(f"== {name}")
        begun, status = self._begun(name), self._manifest(name).get("status")
        phase = self._known.pop(name, Phase(lost=status == "running")) if begun else Phase()
        phase.lost, phase.open, phase.before = phase.lost + phase.open, False, status == "done"
        self.passed[name] = phase
        if phase.before:
            yield
            self._add_told(name, phase)
            return
        as_it_was = _bytes(self._workdir / SUMMARY)
        forget_peak()
        phase.open, start = True, time.monotonic()
        if begun:  # else there is no folder of ours yet, and may never be
            self._save()
        try:
            with _collected(phase.warnings):
                yield
        except InputError:
            self._restore(as_it_was)
            raise
        except BaseException:
            self._close(name, phase, start)
            raise
        self._close(name, phase, start)

    def _close(self, name: str, phase: Phase, start: float) -> None:
        phase.seconds, phase.calls, phase.open = phase.seconds + time.monotonic() - start, phase.calls + 1, False
        phase.peak_bytes, phase.peak_of = max((phase.peak_bytes, phase.peak_of), peak_bytes())
        self._add_told(name, phase)
        if self._begun(name):
            self._save()

    def _restore(self, content: bytes | None) -> None:
        path = self._workdir / SUMMARY
        if processes.first() and content != _bytes(path):
            if content is None:
                path.unlink()
            else:
                write_bytes(path, content)

    def _begun(self, name: str) -> bool:
        return name in MARKS and (self._workdir / MARKS[name]).exists()

    def _manifest(self, name: str) -> dict[str, Any]:
        """Of the phase's stage; empty where there is none."""
        mark = self._workdir / MARKS.get(name, "")
        return manifest_if_any(mark.parent) if mark.name == MANIFEST else {}

    def _add_told(self, name: str, phase: Phase) -> None:
        """What the stage's manifest tells of, as of a call that was killed or of another command."""
        outcome = self._manifest(name).get("outcome", {})
        for text in outcome.get("warnings", ()):
            phase.warnings.setdefault(text, 1)
        phase.spent = outcome.get("seconds", phase.spent)
        if outcome.get("peak_bytes", 0) > phase.peak_bytes:
            phase.peak_bytes, phase.peak_of = outcome["peak_bytes"], outcome["peak_of"]

    def _save(self) -> None:
        if processes.first():
            write_json(self._workdir / SUMMARY, {"phases": self.as_json(self._known | self.passed)})

    def as_json(self, phases: dict[str, Phase] | None = None) -> dict[str, Any]:
        """What this run passed, or ``phases``, as summary.json holds it."""
        return {name: dataclasses.asdict(phase) for name, phase in (phases or self.passed).items()}


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _read(path: Path) -> dict[str, Phase]:
    if not path.is_file():
        return {}
    problem = "not a summary of ours; move it away"
    found = read_object(path, problem)
    with parsing(path, problem):
        return {name: Phase(**phase) for name, phase in found["phases"].items()}


@contextlib.contextmanager
def _collected(warnings: dict[str, int]) -> Iterator[None]:
    """Count what is logged as a warning or worse; it is shown as ever."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings[record.getMessage()] = warnings.get(record.getMessage(), 0) + 1

    handler = Collector(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
