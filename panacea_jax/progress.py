"""Progress of a long job: a bar with ETA on a terminal, a line now and then in a log file."""

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from panacea_jax.parallel import processes
from panacea_jax.terminal import safe_text

SECONDS_BETWEEN_LINES = 30.0


def say(text: str) -> None:
    """One line for the person who watches, on stderr (stdout is for results); only the first process speaks."""
    if processes.first():
        print(safe_text(text), file=sys.stderr, flush=True)


def table_console(width: int) -> Console:
    """Where tables go, stdout: as wide as the terminal; in a file, where lines have no end, as wide as the table needs."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


class Progress:
    """``with Progress("train", total=100) as bar: bar.advance("loss 0.1")``. Only the first process prints."""

    def __init__(self, title: str, total: int, start: int = 0) -> None:
        self._title, self._total, self._done, self._start = title, total, start, start
        self._began = self._last_line = time.monotonic()
        console = Console(stderr=True)
        self._loud = processes.first()
        self._bar: RichProgress | None = None
        if self._loud and console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
            )  # fmt: skip

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                self._title, total=self._total, completed=self._done, note=""
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, note: str = "", by: int = 1) -> None:
        """``by`` more are done."""
        self._done += by
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=note)
        elif self._loud and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            rate = (self._done - self._start) / (self._last_line - self._began)
            left = (self._total - self._done) / rate if rate else float("inf")
            print(
                f"{self._title} {self._done}/{self._total} {note} {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
