"""Cross-entropy where a token is to be predicted, and nowhere else.

The output head is a fifth of a small model, and of a record with a short answer nearly every position is prompt or padding. So texts of
more than ``WHOLE`` positions have the positions that count picked out first, by each device from its own rows, and logits made of
``CHUNK`` of them at a time, as often as there are any: how many is found on the device, so it changes no shape. The gradient of a chunk is
taken while its logits are there; the backward pass only scales it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from panacea_jax.models.decoder import Head
from panacea_jax.models.precision import wide
from panacea_jax.parallel import batch_sharding
from panacea_jax.parallel.sharding import batch_rows

# Texts up to this length have their logits all at once.
WHOLE = 32
# Positions of a device whose logits exist at a time: [B, T, V] of a vocabulary of 256k would outweigh all else that a step holds.
CHUNK = 128


def summed_cross_entropy(
    head: Head,
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    mesh: Mesh,
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """``Σ −c log p(target | x)`` over the positions of the mask, in at least float32.

    Args:
        head: output head.
        x: final hidden states.
        targets: the token that each position is to predict.
        mask: positions that count.
        mesh: devices that the rows are split over.
        weights: c, of each position; None: 1. The gradient by a weight is the cross-entropy of its position.
    """
    with jax.named_scope("cross_entropy"):
        rows, positions = targets.shape
        parts = 1 if rows % batch_rows(mesh) else batch_rows(mesh)
        if num_chunks(rows // parts, positions) <= 1:
            return _of_positions(head, x, targets, mask, weights)
        # Each device's rows end to end, those positions first that count; behind the last ones zeros fill up a chunk.
        given = (x, targets, mask, weights)
        x, targets, mask, weights = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[2:]), given)
        counted = jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % CHUNK)))
        order = jnp.argsort(~counted, axis=1, stable=True)
        given = (x, targets, mask, weights)
        x, targets, mask, weights = jax.tree.map(lambda a: _picked(a, order), given)
        if parts > 1:
            x = jax.lax.with_sharding_constraint(x, batch_sharding(mesh))
        return _in_chunks(head, x, targets, mask, weights)


def num_chunks(rows: int, positions: int) -> int:
    """Pieces in which the loss takes so many rows of a device, if every position counts."""
    return 1 if positions <= WHOLE else -(-rows * positions // CHUNK)


@jax.vmap
def _picked(values: Array, order: Int[Array, "N"]) -> Array:
    """Entries of one device's positions; beyond the last one 0."""
    return values.at[order].get(mode="fill", fill_value=0, unique_indices=True)


def _of_positions(
    head: Head,
    x: Float[Array, "P C D"],
    targets: Int[Array, "P C"],
    mask: Bool[Array, "P C"],
    weights: Float[Array, "P C"] | None,
) -> Float[Array, ""]:
    """With all logits at once."""
    logits = head(x)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    each = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.where(mask, each if weights is None else weights * each, 0).sum()


@jax.custom_vjp
def _in_chunks(
    head: Head,
    x: Float[Array, "P N D"],
    targets: Int[Array, "P N"],
    mask: Bool[Array, "P N"],
    weights: Float[Array, "P N"] | None,
) -> Float[Array, ""]:
    """The sum over chunks of the positions (axis 1), which are picked: those that do not count come last."""

    def add(i: Int[Array, ""], total: Float[Array, ""]) -> Float[Array, ""]:
        return total + _of_positions(head, *_chunk(i, x, targets, mask, weights))

    return jax.lax.fori_loop(0, _turns(mask), add, jnp.zeros((), wide(x.dtype)))


def _with_gradient(
    head: Any, x: Any, targets: Any, mask: Any, weights: Any
) -> tuple[Float[Array, ""], Any]:
    """The sum, and its gradient by the positions, by their weights if they have any, and by the head's matrix where that is trained."""
    trained = head.matrix.perturbed
    given = (head, x, targets, mask, weights)
    head, x, targets, mask, weights = custom_vjp_primal_tree_values(given)
    wanted = (*((0,) if trained else ()), 1, *(() if weights is None else (4,)))

    def add(i: Int[Array, ""], carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        total, by_head, by_each = carry
        pieces = _chunk(i, x, targets, mask, weights)
        value, found = jax.value_and_grad(_of_positions, wanted)(head, *pieces)
        of_head, of_each = (found[0], found[1:]) if trained else (None, found)
        by_head = jax.tree.map(jnp.add, by_head, of_head)
        by_each = jax.tree.map(
            lambda g, new: jax.lax.dynamic_update_slice_in_dim(g, new, i * CHUNK, 1), by_each, of_each
        )
        return total + value, by_head, by_each

    each = (x,) if weights is None else (x, weights)
    by_head, by_each = jax.tree.map(jnp.zeros_like, (head if trained else None, each))
    start = (jnp.zeros((), wide(x.dtype)), by_head, by_each)
    total, *gradients = jax.lax.fori_loop(0, _turns(mask), add, start)
    return total, tuple(gradients)


def _scaled(gradients: tuple[Any, Any], by: Any) -> tuple[Any, Any, None, None, Any]:
    if isinstance(by, SymbolicZero):
        return None, None, None, None, None
    # In the wide dtype: rounded to bfloat16 the factor would be off by as much for every entry.
    by_head, (by_x, *by_weights) = jax.tree.map(
        lambda g: (g.astype(by.dtype) * by).astype(g.dtype), gradients
    )
    return by_head, by_x, None, None, by_weights[0] if by_weights else None


_in_chunks.defvjp(_with_gradient, _scaled, symbolic_zeros=True)


def _chunk(i: Int[Array, ""], *arrays: Array | None) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * CHUNK, CHUNK, 1), arrays)


def _turns(mask: Bool[Array, "P N"]) -> Int[Array, ""]:
    """Chunks that hold a position that counts, on any device."""
    return -(-mask.sum(axis=1, dtype=jnp.int32).max() // CHUNK)
