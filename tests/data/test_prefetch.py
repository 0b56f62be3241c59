"""Running ahead: order, depth, errors in their place, and a thread that ends."""

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from panacea_jax.data.batches import prefetch

PATIENCE = 10.0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def workers() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    until(lambda: workers() == 0)


def test_items_in_order_through_put():
    assert list(prefetch(range(50), depth=3, put=lambda x: x * x)) == [i * i for i in range(50)]
    assert list(prefetch([])) == []
    assert list(prefetch([None, False, 0])) == [None, False, 0]


def test_a_function_is_called_until_it_stops():
    assert list(prefetch(iter("abc").__next__)) == ["a", "b", "c"]


def test_put_runs_in_the_thread():
    seen = list(prefetch(range(2), put=lambda _: threading.current_thread().name))
    assert seen == ["prefetch", "prefetch"]


@pytest.mark.parametrize("depth", [1, 4])
def test_it_runs_ahead_by_its_depth_and_one(depth: int):
    built: list[int] = []
    with prefetch(itertools.count(), depth, put=built.append) as ahead:
        until(lambda: len(built) == depth + 1)
        time.sleep(0.05)
        assert len(built) == depth + 1
        next(ahead)
        until(lambda: len(built) == depth + 2)


def test_an_error_comes_in_its_place():
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("row 3")

    ahead = prefetch(broken())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(KeyError, match="row 3") as caught:
        next(ahead)
    assert "broken" in [entry.name for entry in caught.traceback]
    with pytest.raises(StopIteration):
        next(ahead)


def test_an_error_of_put_and_of_a_function():
    def fail(*_: object) -> None:
        raise OSError("device gone")

    with pytest.raises(OSError, match="device gone"):
        next(prefetch([1], put=fail))
    with pytest.raises(OSError, match="device gone"):
        next(prefetch(fail))


def test_leaving_early_stops_the_thread():
    with prefetch(itertools.count()) as ahead:
        assert next(ahead) == 0
        assert workers() == 1
    assert workers() == 0
    assert list(ahead) == []
    ahead.close()


def test_an_error_of_the_consumer_stops_the_thread():
    with pytest.raises(ZeroDivisionError), prefetch(itertools.count()) as ahead:
        _ = 1 // next(ahead)
    assert workers() == 0


def test_an_abandoned_one_stops_by_itself():
    ahead = prefetch(itertools.count())
    assert next(ahead) == 0
    del ahead
    gc.collect()
    until(lambda: workers() == 0)


def test_depth_must_be_positive():
    with pytest.raises(ValueError, match="depth must be at least 1"):
        prefetch([], depth=0)


def test_close_drops_what_was_built():
    class Buffer:
        pass

    alive: weakref.WeakSet[Buffer] = weakref.WeakSet()

    def build() -> Buffer:
        buffer = Buffer()
        alive.add(buffer)
        return buffer

    ahead = prefetch(build, depth=3)
    until(lambda: len(alive) == 4)
    ahead.close()
    gc.collect()
    assert len(alive) == 0
