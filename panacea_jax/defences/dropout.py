"""Dropout of an adapter's inputs in a step: which batch, and which pass over it, gets which masks.

A mask follows from one raw key for each row of a batch, so it is a function of seed, step, stream, row and pass alone: a resumed run,
rows in micro-batches and rows over several devices get the same. Batches that bring no keys have no dropout: whole sets that a method
looks at, evaluation, decoding. Where a method goes over one batch several times it says so with :func:`again`, and each pass gets masks
of its own, as in PyTorch; a frozen reference sees the batch :func:`without_dropout`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, UInt32

from panacea_jax.data.batches import Batch

# Apart from what a method makes of the step's key.
_DROPOUT = 0x64726F70


def with_dropout(
    batches: Mapping[str, Batch], params: Any, key: Key[Array, ""]
) -> Mapping[str, Batch]:
    """The batches of a step, with keys where ``params`` is an adapter with dropout."""
    if not getattr(params, "dropout", 0.0):
        return batches
    key = jax.random.fold_in(key, _DROPOUT)
    keys = dict(zip(sorted(batches), jax.random.split(key, len(batches))))
    return {
        name: batch._replace(dropout=_raw(jax.random.split(keys[name], len(batch.tokens))))
        for name, batch in batches.items()
    }


def again(batch: Any, number: int | Array) -> Any:
    """The batch as pass ``number`` over it sees it, counted from 0, which is the batch itself."""
    if getattr(batch, "dropout", None) is None:
        return batch
    rows = jax.random.wrap_key_data(jnp.asarray(batch.dropout))
    return batch._replace(dropout=_raw(jax.vmap(jax.random.fold_in, (0, None))(rows, number)))


def without_dropout(batch: Batch) -> Batch:
    """The batch for a pass without masks."""
    return batch._replace(dropout=None)


def _raw(keys: Key[Array, "B"]) -> UInt32[Array, "B _"]:
    return jax.random.key_data(keys)
