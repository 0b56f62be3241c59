"""The key/value cache of incremental decoding.

A settled token lies in the slot of its position, counted from the end of what all texts share, so a row
needs no more than its length to tell which slots count: those before it are its text, those behind it are
stale or empty and no query sees them.

A new token comes among the recent ones first. Rows have different lengths, hence writing one token of
each row to its slot is a scatter, which took a third of a step of the 58 M model on a CPU; among the
recent ones all rows write to one place. :func:`settle` moves them every so many tokens.

What all texts begin with is kept once, not in each row.

Each layer has arrays of its own, because a loop then writes them in place and a matrix product reads
them as they lie; out of one stack of all layers each of them would be copied at every token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from panacea_jax.models.config import ModelConfig


class Slots(NamedTuple):
    """Keys (rotated) or values of one layer.

    Attributes:
        x: in the compute dtype, or int8.
        scale: of each token and head in the int8 cache, ``x * scale`` being the value; else None.
    """

    x: Num[Array, "B KV S hd"]
    scale: Float[Array, "B KV S"] | None = None


KeysValues = tuple[Slots, Slots]
Layers = tuple[KeysValues, ...]


class KVCache(NamedTuple):
    """Keys and values of the tokens read so far.

    Attributes:
        layers: settled keys and values of each layer.
        length: settled tokens of each row.
        recent: keys and values of each layer that follow those.
        fresh: how many of them there are, the same in each row.
        shared: keys and values of each layer ``[1, KV, P, hd]`` of the tokens that come before all rows'; () where there are none.
    """

    layers: Layers
    length: Int[Array, "B"]
    recent: Layers
    fresh: Int[Array, ""]
    shared: Layers = ()

    @property
    def slots(self) -> int:
        """S, the most settled tokens that a row can hold."""
        return num_slots(self.layers)

    @property
    def next(self) -> Int[Array, "B"]:
        """Position of each row's next token."""
        return num_slots(self.shared) + self.length + self.fresh


def num_slots(layers: Layers) -> int:
    """Tokens that each row of these arrays holds."""
    return int(layers[0][0].x.shape[2]) if layers else 0


def init_cache(
    config: ModelConfig, batch: int, slots: int, recent: int, dtype: Any, shared: Layers = ()
) -> KVCache:
    """An empty cache of ``slots`` settled and ``recent`` recent tokens a row; ``dtype`` int8 for the quantised one."""

    def empty(slots: int) -> Slots:
        shape = (batch, config.num_kv_heads, slots)
        scale = jnp.zeros(shape, jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None
        return Slots(jnp.zeros((*shape, config.head_dim), dtype), scale)

    def layers(slots: int) -> Layers:
        return tuple((empty(slots), empty(slots)) for _ in range(config.num_layers))

    length, fresh = jnp.zeros((batch,), jnp.int32), jnp.zeros((), jnp.int32)
    one = empty(1)
    kept = tuple((like(k.x, one), like(v.x, one)) for k, v in shared)
    return KVCache(layers(slots), length, layers(recent), fresh, kept)


def quantise_tokens(x: Float[Array, "B KV T hd"]) -> Slots:
    """Round to int8 with one scale for each token and head: the largest entry becomes ±127, the error is at most scale/2."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    safe = jnp.where(scale > 0, scale, 1.0)
    return Slots(jnp.round(wide / safe[..., None]).astype(jnp.int8), scale)


def like(x: Float[Array, "B KV T hd"], slots: Slots) -> Slots:
    """``x`` in the form of ``slots``."""
    return Slots(x.astype(slots.x.dtype)) if slots.scale is None else quantise_tokens(x)


def write_slots(slots: Slots, x: Float[Array, "B KV T hd"], start: Int[Array, ""]) -> Slots:
    """Write T new tokens of each row from slot ``start`` on, the same for all."""

    def put(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=2)

    return jax.tree.map(put, slots, like(x, slots))


def settle(cache: KVCache, count: Int[Array, "B"]) -> KVCache:
    """Move the recent tokens behind the settled ones; ``count`` of each row are kept.

    A row that goes on needs slots for all the recent ones; of one without, which has ended, nothing sensible is left.
    """
    move: Any = jax.vmap(
        lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1)
    )

    def put(old: Array, new: Array) -> Array:
        return move(old, new, cache.length)

    layers = jax.tree.map(put, cache.layers, cache.recent)
    return cache._replace(
        layers=layers, length=cache.length + count, fresh=jnp.zeros_like(cache.fresh)
    )


def copy_into(layers: Layers, into: Layers) -> Layers:
    """Settled tokens in arrays of another size, as many slots as both have."""
    slots = min(num_slots(layers), num_slots(into))

    def put(x: Array, y: Array) -> Array:
        return y.at[:, :, :slots].set(x[:, :, :slots])

    return jax.tree.map(put, layers, into)


def insert(cache: KVCache, new: Layers, length: Int[Array, "P"], rows: Int[Array, "P"]) -> KVCache:
    """Put newly read tokens in the place of ``rows``; a row number outside is left out. Slots that are too many hold padding."""
    slots = min(cache.slots, num_slots(new))

    def put(old: Slots, x: Slots) -> Slots:
        fresh = like(x.x[:, :, :slots], old)
        return jax.tree.map(lambda o, n: o.at[rows, :, :slots].set(n, mode="drop"), old, fresh)

    layers = tuple(
        (put(k, new_k), put(v, new_v)) for (k, v), (new_k, new_v) in zip(cache.layers, new)
    )
    length = cache.length.at[rows].set(length, mode="drop")
    return cache._replace(layers=layers, length=length)
