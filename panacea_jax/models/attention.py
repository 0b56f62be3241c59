"""Attention in plain JAX (``"xla"``): the reference that the back-ends of fused.py are tested against, and the way through a cache."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from panacea_jax.models.cache import Slots
from panacea_jax.models.precision import wide


def attend(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B KV S hd"],
    v: Float[Array, "B KV S hd"],
    mask: Bool[Array, "B T S"],
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T H hd"]:
    """Softmax attention with grouped queries: query head h reads key/value head h // (H/KV), which
    is never repeated in memory.

    Scores and softmax are in at least float32. A row whose mask is all False (a padding query)
    gives the mean of ``v``: finite, as is its gradient.

    Args:
        q: queries. k: keys. v: values.
        mask: True where the query may see the key.
        scale: multiplier of q·k.
        softcap: c; scores become c·tanh(scores/c) before masking (Gemma 2, arXiv 2408.00118, §2).
    """
    rows = _rows(q, k.shape[1])
    scores = jnp.einsum("bknd,bksd->bkns", rows, k, preferred_element_type=wide(q.dtype))
    scores = _seen(scores[:, :, None], mask, scale, softcap)[:, :, 0]
    weights = jax.nn.softmax(scores, axis=-1)
    return _heads(jnp.einsum("bkns,bksd->bknd", weights.astype(q.dtype), v), q)


# Slots that are summed over together.
SLOT_BLOCK = 64


def attend_in_parts(
    q: Float[Array, "B T H hd"],
    keys: Sequence[Slots],
    values: Sequence[Slots],
    mask: Bool[Array, "B T S"],
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T H hd"]:
    """The same over keys and values that lie in several arrays, which are not joined in memory.

    Sums over slots are taken in blocks, in order, and a block that no query sees adds exact zeros. So the number of
    slots changes no bit, as long as the compiler takes the same kernels for it (see ``GROWS`` of decode.py).

    Args:
        q: queries, each of which sees a key.
        keys: arrays ``[B, KV, Sᵢ, hd]``, or ``[1, KV, Sᵢ, hd]`` of what all rows share; S slots together.
        values: likewise.
        mask, scale, softcap: as in :func:`attend`.
    """
    rows = _rows(q, keys[0].x.shape[1])
    ends = list(itertools.accumulate(k.x.shape[2] for k in keys))
    masks = jnp.split(mask, ends[:-1], axis=2)
    scores = [_seen(_scores(rows, k), m, scale, softcap) for k, m in zip(keys, masks)]
    top = functools.reduce(jnp.maximum, (jnp.max(x, axis=(2, 4)) for x in scores))
    weights = [jnp.exp(x - top[:, :, None, :, None]) for x in scores]
    total = functools.reduce(jnp.add, (_in_order(jnp.sum(w, axis=-1)) for w in weights))
    parts = (_in_order(_weighted(w, v, q.dtype)) for w, v in zip(weights, values))
    out = functools.reduce(jnp.add, parts)
    return _heads((out / total[..., None]).astype(q.dtype), q)


def _rows(q: Float[Array, "B T H hd"], kv_heads: int) -> Float[Array, "B KV n hd"]:
    """Heads in front, and the queries of a group as rows of one matrix: products then read keys and values as they lie."""
    b, t, heads, dim = q.shape
    rows = q.reshape(b, t, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    return rows.reshape(b, kv_heads, -1, dim)


def _heads(out: Float[Array, "B KV n hd"], q: Float[Array, "B T H hd"]) -> Array:
    """Back to the shape of ``q``."""
    b, t, _, dim = q.shape
    out = out.reshape(b, out.shape[1], -1, t, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape)


def _seen(
    scores: Float[Array, "B KV C n s"],
    mask: Bool[Array, "B T S"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B KV C n s"]:
    """Scaled and capped; the lowest finite number where the mask is False."""
    b, kv_heads, blocks, _, size = scores.shape
    t = mask.shape[1]
    scores = scores * scale
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    mask = mask.reshape(b, t, blocks, size).transpose(0, 2, 1, 3)[:, None, :, None]
    # Not -inf: an all-masked row would otherwise be 0/0.
    lowest = jnp.finfo(scores.dtype).min  # type: ignore[no-untyped-call]
    by_group = scores.reshape(b, kv_heads, blocks, -1, t, size)
    return jnp.where(mask, by_group, lowest).reshape(scores.shape)


def _blocks(x: Array) -> Array:
    """``[B, KV, S, …]`` as ``[B, KV, C, S / C, …]``."""
    count = x.shape[2] // SLOT_BLOCK if x.shape[2] % SLOT_BLOCK == 0 else 1
    return x.reshape(*x.shape[:2], count, -1, *x.shape[3:])


def _scores(rows: Float[Array, "B KV n hd"], k: Slots) -> Float[Array, "B KV C n s"]:
    x = _blocks(k.x.astype(rows.dtype))
    if x.shape[0] == len(rows):
        scores = jnp.einsum("bknd,bkcsd->bkcns", rows, x, preferred_element_type=wide(rows.dtype))
    else:
        scores = jnp.einsum("bknd,kcsd->bkcns", rows, x[0], preferred_element_type=wide(rows.dtype))
    return scores if k.scale is None else scores * _blocks(k.scale)[:, :, :, None]


def _weighted(weights: Float[Array, "B KV C n s"], v: Slots, dtype: Any) -> Array:
    """Sums of values within each block, ``[B, KV, C, n, hd]``."""
    if v.scale is not None:
        weights = weights * _blocks(v.scale)[:, :, :, None]
    x, w, out = _blocks(v.x.astype(dtype)), weights.astype(dtype), weights.dtype
    if x.shape[0] == len(w):
        return jnp.einsum("bkcns,bkcsd->bkcnd", w, x, preferred_element_type=out)
    return jnp.einsum("bkcns,kcsd->bkcnd", w, x[0], preferred_element_type=out)


def _in_order(x: Float[Array, "B KV C *rest"]) -> Float[Array, "B KV *rest"]:
    """The sum over blocks, the first one first."""
    return functools.reduce(jnp.add, (x[:, :, i] for i in range(x.shape[2])))
