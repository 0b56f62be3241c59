"""What the frozen layers below an adapter make of each record: computed once, before the first step, and kept on the host.

With an adapter of upper layers only (``config.lora.layers``) the hidden states that enter the lowest of them depend on the record alone.
A step that is given them computes nothing below.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float

from panacea_jax.data.batches import Batch, Stream
from panacea_jax.data.encode import Example
from panacea_jax.defences import Defence, Loss
from panacea_jax.defences.protocol import passes_of
from panacea_jax.models.adapter import Adapter
from panacea_jax.models.inputs import Inputs
from panacea_jax.models.model import Model
from panacea_jax.parallel import processes
from panacea_jax.progress import Progress
from panacea_jax.train.feeding import WholeSet

# Bytes that a process keeps at most, all streams together.
LIMIT = 4 * 2**30


def with_entering(
    model: Model, params: Any, defence: Defence, streams: Mapping[str, Stream], steps: int
) -> dict[str, Stream]:
    """The streams of a step with hidden states beside the tokens, where that pays: of each whose records are passed through twice or more.

    Args:
        model: base.
        params: trainable tree.
        defence: whose passes are counted.
        streams: those that it draws on.
        steps: of the whole run, so that one that is resumed decides the same.
    """
    out, passes, left = dict(streams), passes_of(defence), LIMIT
    if not isinstance(params, Adapter) or not params.lowest or defence.reads_every_layer:
        return out
    for name, stream in streams.items():
        tokens = sum(len(example.tokens) for example in stream.examples)
        size = tokens * model.config.hidden_size * model.dtype.itemsize
        times = passes[name] * steps * stream.batch_size / len(stream.examples)
        if times < 2 or size > left:
            why = f"needs {size / 2**20:.0f} MiB" if size > left else f"each record is passed {times:.1f} times"
            logging.info("stream %r: nothing kept of the frozen layers: %s", name, why)
            continue
        left -= size
        logging.info("stream %r: %.0f MiB of what enters layer %d kept", name, size / 2**20, params.lowest)  # fmt: skip
        out[name] = computed(model, params, stream)
    return out


def computed(model: Model, params: Adapter, stream: Stream) -> Stream:
    """A stream whose records know what enters the lowest adapted layer; of several processes all must ask."""
    loss = Loss.of(model)
    examples: list[Example] = []
    with Progress(f"frozen layers of {stream.name}", total=len(stream.examples)) as bar:
        for batch in WholeSet(model, stream):
            rows = processes.to_host(_entering(loss, params, batch))
            for example, row in zip(stream.examples[len(examples) :], rows[: stream.batch_size]):
                examples.append(_with(example, row[: len(example.tokens)]))
                bar.advance()
    return dataclasses.replace(stream, examples=examples)


@jax.jit
def _entering(loss: Loss, params: Adapter, batch: Batch) -> Float[Array, "B T D"]:
    return loss.bind(params).entering(Inputs.of(batch.tokens, batch.valid))


def _with(example: Example, entering: np.ndarray) -> Example:
    # A copy, or the padding of the whole batch would be kept.
    return dataclasses.replace(example, entering=entering.copy())
