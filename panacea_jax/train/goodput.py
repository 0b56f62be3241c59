"""What the seconds of a stage went to."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

# compile: calls of the step with a new shape, and asking the compiler for their memory. data: waiting for a batch, and what is computed of
# records before the first step. step: steps, and a method's looks at whole sets. save: checkpoints and exports. evaluate: held-out records.
PARTS = ("compile", "data", "step", "save", "evaluate", "other")


class Goodput:
    """``with spent("save"): …``; each second counts once: what is entered within takes it from what is around."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "other", time.monotonic()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the block as ``part``, one of ``PARTS``."""
        around = self._part
        self._enter(part)
        try:
            yield
        finally:
            self._enter(around)

    def waiting(self, part: str, items: Iterable[T]) -> Iterator[T]:
        """The items; the time until each is there counts as ``part``."""
        items = iter(items)
        while True:
            with self(part):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def seconds(self) -> dict[str, float]:
        """So far, by part."""
        self._enter(self._part)
        return {part: round(seconds, 3) for part, seconds in self._seconds.items()}

    def restore(self, notes: Mapping[str, Any]) -> None:
        """Add the ``seconds`` of the run that was stopped, as far as its last checkpoint tells them."""
        for part, seconds in notes.get("seconds", {}).items():
            self._seconds[part] += seconds

    def _enter(self, part: str) -> None:
        now = time.monotonic()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now


def shares(seconds: Mapping[str, float]) -> str:
    """``step 61 %, compile 30 %, …``, the largest first; parts below half a percent are left out."""
    total = sum(seconds.values()) or 1.0
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{part} {100 * each / total:.0f} %" for part, each in parts if each / total >= 0.005)
