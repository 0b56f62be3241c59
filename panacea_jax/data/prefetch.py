"""Batches built ahead of the step that needs them, so that the device never waits on the host."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# How long a full queue is waited on before the worker looks again whether it shall stop, seconds.
_POLL = 0.1


class Prefetch(Iterator[Any]):
    """Iterator over a source that a background thread runs ahead of; also a context manager.

    Errors of the source or of `put` are raised where the item would have come, after the items
    before it. Leaving the context, `close`, or losing the last reference stops the thread.
    """

    def __init__(self, source: Iterable[Any], depth: int, put: Callable[[Any], Any] | None) -> None:
        if depth < 1:
            raise ValueError(f"prefetch depth must be at least 1, not {depth}")
        self._items: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._done = False
        # The worker knows the queue but not this object, so an abandoned one can be collected.
        self._thread = threading.Thread(
            target=_work, args=(source, put, self._items, self._stop), name="prefetch", daemon=True
        )
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Any:
        if self._done:
            raise StopIteration
        kind, value = self._items.get()
        if kind == "item":
            return value
        self._done = True
        self._thread.join()
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and drop what it had built; returns when it has ended. Idempotent."""
        self._done = True
        self._stop.set()
        self._thread.join()
        while not self._items.empty():  # frees the device memory of batches nobody will take
            self._items.get_nowait()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetch(
    source: Iterable[Any] | Callable[[], Any],
    depth: int = 2,
    put: Callable[[Any], Any] | None = None,
) -> Prefetch:
    """Run ahead of `source` by up to `depth` finished items and one in the making.

    Args:
        source: An iterable, or a function that returns the next item and raises StopIteration
            after the last.
        depth: Items kept ready, at least 1.
        put: Applied to each item in the thread, for example to put a batch on its devices.
    """
    return Prefetch(_calls(source) if callable(source) else source, depth, put)


def _calls(function: Callable[[], Any]) -> Iterator[Any]:
    while True:
        try:
            item = function()
        except StopIteration:
            return
        yield item


def _work(
    source: Iterable[Any],
    put: Callable[[Any], Any] | None,
    items: "queue.Queue[tuple[str, Any]]",
    stop: threading.Event,
) -> None:
    try:
        for item in source:
            if stop.is_set() or not _offer(
                ("item", item if put is None else put(item)), items, stop
            ):
                return
        last: tuple[str, Any] = ("end", None)
    except BaseException as error:  # handed to the consumer, KeyboardInterrupt and all
        last = ("error", error)
    _offer(last, items, stop)


def _offer(
    entry: tuple[str, Any], items: "queue.Queue[tuple[str, Any]]", stop: threading.Event
) -> bool:
    """Queue an entry; False if the consumer left before there was room."""
    while not stop.is_set():
        try:
            items.put(entry, timeout=_POLL)
        except queue.Full:
            continue
        return True
    return False
