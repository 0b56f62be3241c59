"""How a run ends early. SIGTERM, as schedulers send it, becomes a flag that the loop looks at after each step."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from panacea_jax.parallel import processes


class Preempted(Exception):
    """SIGTERM came; the state is saved. The command line exits with 75, so that a scheduler starts it again."""


class Diverged(Exception):
    """The loss stopped being a number."""


class Stop:
    """Whether SIGTERM came."""

    def __init__(self) -> None:
        self._set = False

    def set(self, *_: Any) -> None:
        """It came."""
        self._set = True

    def asked(self) -> bool:
        """Whether to stop after this step; several processes, of which perhaps one alone was told to stop, agree on the step."""
        return processes.stop_asked() if processes.count() > 1 else self._set


@contextlib.contextmanager
def sigterm() -> Iterator[Stop]:
    """Catch SIGTERM for the length of the block; outside the main thread signals cannot be caught."""
    stop = Stop()
    if processes.count() > 1:  # jax.distributed catches the signal itself
        yield stop
        return
    try:
        previous = signal.signal(signal.SIGTERM, stop.set)
    except ValueError:
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
