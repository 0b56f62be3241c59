"""Says what every thread is at when a run has not moved for long."""

import contextlib
import contextvars
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from panacea_jax.parallel import processes

# Exit code of a run that is ended.
STALLED = 1
# Seconds between two looks, at most.
LOOK = 5.0


class Watchdog(threading.Thread):
    """Looks whether something ends now and then, while there is something that should."""

    def __init__(self, seconds: float, folder: Path | None, stop: bool) -> None:
        """
        Args:
            seconds: without a movement, until it speaks; it does so once.
            folder: for the file with the stacks; None, or one that is not there: they are printed alone.
            stop: the process ends then.
        """
        super().__init__(name="watchdog", daemon=True)
        self._seconds, self._folder, self._ends = seconds, folder, stop
        self._working, self._moved, self._over = 0, time.monotonic(), threading.Event()

    def move(self, begun: int = 0) -> None:
        """Something ended; ``begun``: 1 more thing has begun of which parts should end, or -1."""
        self._working, self._moved = self._working + begun, time.monotonic()

    def end(self) -> None:
        """Look no more."""
        self._over.set()
        self.join()

    def run(self) -> None:
        """Until it has spoken, or is ended."""
        while not self._over.wait(min(LOOK, self._seconds / 4)):
            if self._working and time.monotonic() - self._moved >= self._seconds:
                self._speak()
                return

    def _speak(self) -> None:
        stacks, where = _stacks(), ""
        if self._folder is not None:
            path = self._folder / f"stacks.{os.getpid()}.txt"
            with contextlib.suppress(OSError):
                path.write_text(stacks, "utf-8")
                where = f", and are in {path}"
        then = "the run ends; the same command goes on from the last checkpoint" if self._ends else "the run goes on"
        line = f"nothing ended for {self._seconds:g} s (config.watch.stall); {then}"
        print(f"{stacks}panacea: {line}. The stacks of all threads stand above{where}", file=sys.stderr, flush=True)
        if self._ends:
            processes.leave(line, STALLED)
            os._exit(STALLED)


def _stacks() -> str:
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


_dog: contextvars.ContextVar[Watchdog | None] = contextvars.ContextVar("watchdog", default=None)


@contextlib.contextmanager
def watched(seconds: float, folder: Path | None = None, stop: bool = False) -> Iterator[None]:
    """Let the block be watched, see :class:`Watchdog`; 0 seconds: it is not."""
    if not seconds:
        yield
        return
    dog = Watchdog(seconds, folder, stop)
    token = _dog.set(dog)
    dog.start()
    try:
        yield
    finally:
        _dog.reset(token)
        dog.end()


def alive() -> None:
    """A step, an answer, a chunk of tokens or a batch has ended."""
    if dog := _dog.get():
        dog.move()


@contextlib.contextmanager
def expecting() -> Iterator[None]:
    """While the block lasts something should end now and then."""
    dog = _dog.get()
    if dog is None:
        yield
        return
    dog.move(1)
    try:
        yield
    finally:
        dog.move(-1)
