"""Says what is waited for, so that nobody takes a run that waits for one that hangs."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from panacea_jax.terminal import safe_text

# Seconds until it is said again; each time twice as many.
AGAIN = 5.0


@contextlib.contextmanager
def waiting(what: Callable[[], str], limit: float | int) -> Iterator[None]:
    """Of a block that waits: says at once for what and for how long at most, and again after 5, 10, 20 … seconds.

    Args:
        what: asked each time; what is waited for may change hands.
        limit: seconds.
    """
    began, over = time.monotonic(), threading.Event()

    def say(since: str = "") -> None:
        print(safe_text(f"waiting for {what()}; {limit:.0f} s at most{since}"), file=sys.stderr, flush=True)

    def again() -> None:
        pause = AGAIN
        while not over.wait(pause):
            say(f", {time.monotonic() - began:.0f} s by now")
            pause *= 2

    say()
    thread = threading.Thread(target=again, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
