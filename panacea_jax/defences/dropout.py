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

# Numbers that lead apart from what a method makes of the step's key, and passes apart from the layers' masks, which are counted from 0.
_DROPOUT, _PASS = 0x64726F70, 2**30


def with_dropout(
    batches: Mapping[str, Batch], params: Any, key: Key[Array, ""]
) -> Mapping[str, Batch]:
    """The batches of a step, with keys where ``params`` is an adapter with dropout."""
    if not getattr(params, "dropout", 0.0):
        return batches
    keys = jax.random.split(jax.random.fold_in(key, _DROPOUT), len(batches))
    by_row = jax.vmap(jax.random.fold_in, (None, 0))  # whatever rows of padding come behind
    return {
        name: batch._replace(dropout=_raw(by_row(keys[i], jnp.arange(len(batch.tokens)))))
        for i, (name, batch) in enumerate(sorted(batches.items()))
    }


def again(batch: Any, number: int | Array) -> Any:
    """The batch as pass ``number`` over it sees it, counted from 0, which is the batch itself."""
    if getattr(batch, "dropout", None) is None:
        return batch
    rows = jax.random.wrap_key_data(jnp.asarray(batch.dropout))
    of_pass = jax.vmap(jax.random.fold_in, (0, None))(rows, _PASS + number)
    return batch._replace(dropout=_raw(of_pass))


def without_dropout(batch: Batch) -> Batch:
    """The batch for a pass without masks."""
    return batch._replace(dropout=None)


def _raw(keys: Key[Array, "B"]) -> UInt32[Array, "B _"]:
    return jax.random.key_data(keys)
