"""Progress of a long job: a bar with ETA on a terminal, a line now and then in a log file."""

import contextlib
import datetime
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress

from panacea_jax import watchdog
from panacea_jax.parallel import processes
from panacea_jax.stores import by_address
from panacea_jax.terminal import safe_text

SECONDS_BETWEEN_LINES = 30.0
# From the first advance, which waits for a compilation, until the rate is worth a guess.
SECONDS_UNTIL_KNOWN = 10.0


def say(text: str) -> None:
    """One line for the person who watches, on stderr (stdout is for results); only the first process speaks."""
    if processes.first():
        print(safe_text(by_address(text)), file=sys.stderr, flush=True)


def table_console(width: int) -> Console:
    """Where tables go, stdout: as wide as the terminal; in a file, where lines have no end, as wide as the table needs."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


class Progress:
    """``with Progress("train", total=100) as bar: bar.advance("loss 0.1")``. Only the first process prints."""

    def __init__(self, title: str, total: int, start: int = 0) -> None:
        self._title, self._total, self._done = title, total, start
        self._last_line = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first advance came, and what was done then
        console = Console(stderr=True)
        self._loud = processes.first()
        self._watched = contextlib.ExitStack()
        self._bar: RichProgress | None = None
        if self._loud and console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(),
                TimeElapsedColumn(), TextColumn("{task.fields[left]}"), TextColumn("{task.fields[note]}"), console=console,
            )  # fmt: skip

    def __enter__(self) -> "Progress":
        self._watched.enter_context(watchdog.expecting())
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                self._title, total=self._total, completed=self._done, note="", left=""
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._watched.close()
        if self._bar is not None:
            self._bar.stop()

    def advance(self, note: str = "", by: int = 1) -> None:
        """``by`` more are done."""
        watchdog.alive()
        self._done += by
        now = time.monotonic()
        left = self._left(now)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=note, left=left)
        elif self._loud and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(*filter(None, (f"{self._title} {self._done}/{self._total}", note, left)), file=sys.stderr, flush=True)

    def _left(self, now: float) -> str:
        """``0:12:30 left``, by the rate since the first advance; "" until that is known."""
        if self._first is None:
            self._first = now, self._done
        began, before = self._first
        if now - began < SECONDS_UNTIL_KNOWN or self._done == before:
            return ""
        seconds = (self._total - self._done) * (now - began) / (self._done - before)
        return f"{datetime.timedelta(seconds=round(seconds))} left"
