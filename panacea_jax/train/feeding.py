"""From streams on the host to batches on the devices: a step's, and whole sets."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from panacea_jax import watchdog
from panacea_jax.data.batches import Batch, Stream
from panacea_jax.data.encode import check_ids
from panacea_jax.defences import Method
from panacea_jax.defences.protocol import has_steps
from panacea_jax.models.model import Model
from panacea_jax.parallel import batch_sharding


def streams_of(
    model: Model, method: Method, streams: Mapping[str, Stream]
) -> dict[str, Stream]:
    """Of the given streams those that a method draws on: with steps the user's, and its extra ones, of which it may want the first records
    alone.

    Raises:
        KeyError: one is missing.
        InputError: a record has a token id that the model does not know, or there are fewer records than the method wants.
    """
    names = [*(["user"] if has_steps(method) else []), *method.streams]
    if missing := [name for name in names if name not in streams]:
        raise KeyError(f"{type(method).__name__} needs the data streams {missing}")
    for name in names:
        rows = (example.tokens for example in streams[name].examples)
        check_ids(rows, model.config.vocab_size, f"stream {name!r}")
    few = {name: spec.first for name, spec in method.streams.items() if spec.first}
    return {name: streams[name].first(few[name]) if name in few else streams[name] for name in names}


def host_batches(
    streams: Mapping[str, Stream], method: Method, start: int, steps: int
) -> Iterator[dict[str, Batch]]:
    """The batches of steps ``start`` … ``steps`` − 1, by stream, each a function of its step alone."""
    for step in range(start, steps):
        yield {name: s.batch(turn) for name, s, turn in _turns(streams, method, step)}


def record_numbers(streams: Mapping[str, Stream], method: Method, step: int) -> dict[str, list[int]]:
    """Numbers of the records that step ``step`` (from 0) takes, by stream."""
    return {name: [i for batch in s.numbers(turn) for i in batch] for name, s, turn in _turns(streams, method, step)}


def _turns(streams: Mapping[str, Stream], method: Method, step: int) -> Iterator[tuple[str, Stream, int]]:
    """Each stream, and which of its batches a step takes."""
    intervals = {name: spec.interval for name, spec in method.streams.items()}
    for name, stream in streams.items():
        yield name, stream, step // intervals.get(name, 1)


def put(model: Model, batches: Mapping[str, Batch]) -> dict[str, Batch]:
    """Place rows on the mesh. Every process builds the same global batch and keeps its own rows."""
    sharding = batch_sharding(model.mesh)

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    placed: dict[str, Batch] = jax.tree.map(place, dict(batches))
    return placed


class WholeSet:
    """Every record of a stream once, on the devices; may be gone through several times."""

    def __init__(self, model: Model, stream: Stream) -> None:
        self._model, self._stream = model, stream

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._stream.once():
            yield put(self._model, {"": batch})[""]
            watchdog.alive()


def whole_sets(model: Model, method: Method, streams: Mapping[str, Stream]) -> dict[str, Any]:
    """Each extra stream of the method as a whole set."""
    return {name: WholeSet(model, streams[name]) for name in method.streams}
