"""What the frozen layers below an adapter make of each record: computed once, before the first step, and kept on the host.

With an adapter of upper layers only (``config.lora.layers``) the hidden states that enter the lowest of them depend on the record alone.
A step that is given them computes nothing below.
"""

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float

from panacea_jax.data.batches import Batch, Stream, bucket, pad
from panacea_jax.data.encode import Example
from panacea_jax.defences import Defence, Loss
from panacea_jax.defences.protocol import passes_of
from panacea_jax.models.adapter import Adapter
from panacea_jax.models.inputs import Inputs
from panacea_jax.models.model import Model
from panacea_jax.parallel import processes
from panacea_jax.progress import Progress
from panacea_jax.train.feeding import put

# Bytes that a process keeps at most, all streams together.
LIMIT = 4 * 2**30


class Kept:
    """Hidden states of records, for the runs of one process that follow each other on one frozen base: they pass many of the same."""

    def __init__(self) -> None:
        self._base: Any = None
        self._rows: dict[bytes, np.ndarray] = {}

    def of(self, base: Any) -> dict[bytes, np.ndarray]:
        """What is known of a base, by tokens; of another one nothing any more.

        Args:
            base: whatever tells its frozen layers from others'.
        """
        if base != self._base:
            self._base, self._rows = base, {}
        return self._rows


def with_entering(
    model: Model,
    params: Any,
    defence: Defence,
    streams: Mapping[str, Stream],
    steps: int,
    known: dict[bytes, np.ndarray] | None = None,
) -> dict[str, Stream]:
    """The streams of a step with hidden states beside the tokens, where that pays: of each whose records are passed through twice or more,
    and of every one whose records other runs may ask for.

    Args:
        model: base.
        params: trainable tree.
        defence: whose passes are counted.
        streams: those that it draws on.
        steps: of the whole run, so that one that is resumed decides the same.
        known: by tokens, what earlier runs on these frozen layers left;
            this run's is added, and the oldest of theirs makes room. None: there are no other runs.
    """
    out, passes = dict(streams), passes_of(defence)
    if not isinstance(params, Adapter) or not params.lowest or defence.reads_every_layer:
        return out
    rows = {} if known is None else known
    asked: set[bytes] = set()
    for name, stream in streams.items():
        interval = defence.streams[name].interval if name in defence.streams else 1
        taken = stream.taken(-(-steps // interval))
        times = passes[name] * steps * stream.batch_size / len(taken)
        new = {e.tokens.tobytes(): len(e.tokens) for e in (stream.examples[i] for i in taken)}
        size = sum(n for tokens, n in new.items() if tokens not in rows) * model.config.hidden_size * model.dtype.itemsize
        held = sum(row.nbytes for tokens, row in rows.items() if tokens in asked or tokens in new)
        if (times < 2 and known is None) or held + size > LIMIT:
            why = f"needs {size / 2**20:.0f} MiB" if held + size > LIMIT else f"each record is passed {times:.1f} times"
            logging.info("stream %r: nothing kept of the frozen layers: %s", name, why)
            continue
        asked |= new.keys()
        _forget(rows, asked, LIMIT - size)
        logging.info("stream %r: %.0f MiB of what enters layer %d kept", name, size / 2**20, params.lowest)
        out[name] = computed(model, params, stream, taken, rows)
    return out


def _forget(rows: dict[bytes, np.ndarray], asked: Container[bytes], limit: int) -> None:
    """Leave out what this run has not asked for, what was known first before the rest, until the others are no larger than a limit."""
    held = sum(row.nbytes for row in rows.values())
    for tokens in [tokens for tokens in rows if tokens not in asked]:
        if held <= limit:
            return
        held -= rows.pop(tokens).nbytes


def computed(model: Model, params: Adapter, stream: Stream, taken: Sequence[int], rows: dict[bytes, np.ndarray]) -> Stream:
    """A stream whose records know what enters the lowest adapted layer; of several processes all must ask.

    Args:
        model: base.
        params: adapter.
        stream: of which steps take some records.
        taken: numbers of those.
        rows: by tokens, what is known already; what is computed is added.
    """
    loss = Loss.of(model)
    # By length, and as many rows each time: what a record gets does not depend on what it is computed with.
    missing: dict[int, dict[bytes, Example]] = {}
    for example in (stream.examples[i] for i in taken):
        if (tokens := example.tokens.tobytes()) not in rows:
            missing.setdefault(bucket(len(example.tokens), stream.buckets), {})[tokens] = example
    with Progress(f"frozen layers of {stream.name}", total=sum(map(len, missing.values()))) as bar:
        for length, left in sorted(missing.items()):
            while left:
                chosen = [left.pop(next(iter(left))) for _ in range(min(stream.batch_size, len(left)))]
                batch = put(model, {"": pad(chosen, length, stream.rows)})[""]
                for example, row in zip(chosen, processes.to_host(_entering(loss, params, batch))):
                    # A copy, or the padding of the whole batch would be kept.
                    rows[example.tokens.tobytes()] = row[: len(example.tokens)].copy()
                    bar.advance()
    examples = list(stream.examples)
    for i in taken:
        examples[i] = dataclasses.replace(examples[i], entering=rows[examples[i].tokens.tobytes()])
    return dataclasses.replace(stream, examples=examples)


@jax.jit
def _entering(loss: Loss, params: Adapter, batch: Batch) -> Float[Array, "B T D"]:
    return loss.bind(params).entering(Inputs.of(batch.tokens, batch.valid, right=True))
