"""The key/value cache of incremental decoding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from panacea_jax.models.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of the tokens read so far.

    Attributes:
        k: rotated keys of every layer and slot. v: values.
        positions: position of the token in each slot.
        valid: False for padding and for slots not yet written.
        length: next slot to write, the same for all rows.
    """

    k: Float[Array, "L B KV S hd"]
    v: Float[Array, "L B KV S hd"]
    positions: Int[Array, "B S"]
    valid: Bool[Array, "B S"]
    length: Int[Array, ""]


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: Any) -> KVCache:
    """An empty cache of ``slots`` tokens a row."""
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        positions=jnp.zeros((batch, slots), jnp.int32),
        valid=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )


def append(cache: KVCache, positions: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> KVCache:
    """Note positions and validity of new tokens; ``length`` moves behind them."""
    start = (jnp.zeros((), jnp.int32), cache.length)
    positions = positions.astype(cache.positions.dtype)
    return cache._replace(
        positions=jax.lax.dynamic_update_slice(cache.positions, positions, start),
        valid=jax.lax.dynamic_update_slice(cache.valid, valid, start),
        length=cache.length + valid.shape[1],
    )


def write_layer(
    k: Float[Array, "B KV T hd"],
    v: Float[Array, "B KV T hd"],
    cache: tuple[Array, Array],
    layer: Int[Array, ""],
    slot: Int[Array, ""],
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Write one layer's new keys and values from ``slot`` on; returns all of that layer's, and the
    cache.

    The stack of all layers is written in place; scanning over it would copy it at every token.
    """
    zero = jnp.zeros((), jnp.int32)
    start = (layer, zero, zero, slot, zero)
    all_k = jax.lax.dynamic_update_slice(cache[0], k[None].astype(cache[0].dtype), start)
    all_v = jax.lax.dynamic_update_slice(cache[1], v[None].astype(cache[1].dtype), start)
    k = jax.lax.dynamic_index_in_dim(all_k, layer, keepdims=False)
    v = jax.lax.dynamic_index_in_dim(all_v, layer, keepdims=False)
    return k, v, (all_k, all_v)
