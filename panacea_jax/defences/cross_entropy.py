"""Cross-entropy where a token is to be predicted, and nowhere else.

The output head is a fifth of a small model, and of a record with a short answer nearly every position is prompt or padding. So texts of
more than ``WHOLE`` positions have the positions that count picked out first, by each device from its own rows, and logits made of
``CHUNK`` of them at a time, as often as there are any: how many is found on the device, so it changes no shape. The gradient of a chunk is
taken while its logits are there; the backward pass only scales it.

A method may weigh tokens, and learn by what each of them counts (BDS), or scale their gradients alone, so that what is summed stays the
cross-entropy (constrained SFT).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jax.sharding import Mesh
from jax.tree_util import Partial
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
    scale: Partial | None = None,
) -> Float[Array, ""]:
    """``Σ −c log p(target | x)`` over the positions of the mask, in at least float32.

    Args:
        head: output head.
        x: final hidden states.
        targets: the token that each position is to predict.
        mask: positions that count.
        mesh: devices that the rows are split over.
        weights: c, of each position; None: 1. The gradient by a weight is the cross-entropy of its position.
        scale: from each position's −log p what its gradient is scaled by, itself without one; the arrays that it holds are ``[B, T]``.
    """
    with jax.named_scope("cross_entropy"):
        parts = _parts(targets, mesh)
        if parts is None:
            return _of_positions(head, x, targets, mask, weights, scale)
        _, (x, *others) = _counted_first(parts, mask, (x, targets, mask, weights, scale))
        if parts > 1:
            x = jax.lax.with_sharding_constraint(x, batch_sharding(mesh))
        return _in_chunks(head, x, *others)


def token_cross_entropy(
    head: Head,
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    mesh: Mesh,
) -> Float[Array, "B T"]:
    """``−log p(target | x)`` of each position by itself, 0 where it does not count; arguments as of ``summed_cross_entropy``. Not to be
    differentiated."""
    with jax.named_scope("cross_entropy"):
        parts = _parts(targets, mesh)
        if parts is None:
            return jnp.where(mask, _of_each(head, x, targets), 0)
        order, (near, wanted, counts) = _counted_first(parts, mask, (x, targets, mask))
        if parts > 1:
            near = jax.lax.with_sharding_constraint(near, batch_sharding(mesh))

        def put(i: Int[Array, ""], found: Float[Array, "P N"]) -> Float[Array, "P N"]:
            x, targets, mask = _chunk(i, (near, wanted, counts))
            each = jnp.where(mask, _of_each(head, x, targets), 0)
            return jax.lax.dynamic_update_slice_in_dim(found, each, i * CHUNK, 1)

        found = jax.lax.fori_loop(0, _turns(counts), put, jnp.zeros(counts.shape, wide(x.dtype)))
        back = jnp.take_along_axis(found, jnp.argsort(order, axis=1), axis=1)
        return back[:, : mask.size // parts].reshape(mask.shape)


def _parts(targets: Int[Array, "B T"], mesh: Mesh) -> int | None:
    """Devices that positions are picked on, each from its own rows; None: all logits are made at once."""
    rows, positions = targets.shape
    parts = 1 if rows % batch_rows(mesh) else batch_rows(mesh)
    return None if num_chunks(rows // parts, positions) <= 1 else parts


def _counted_first(
    parts: int, mask: Bool[Array, "B T"], arrays: Any
) -> tuple[Int[Array, "P N"], Any]:
    """Each device's rows end to end, those positions first that count; behind the last ones zeros fill up a chunk. And the places that they
    came from."""
    ends, arrays = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[2:]), (mask, arrays))
    counted = jnp.pad(ends, ((0, 0), (0, -ends.shape[1] % CHUNK)))
    order = jnp.argsort(~counted, axis=1, stable=True)
    return order, jax.tree.map(lambda a: _picked(a, order), arrays)


def num_chunks(rows: int, positions: int) -> int:
    """Pieces in which the loss takes so many rows of a device, if every position counts."""
    return 1 if positions <= WHOLE else -(-rows * positions // CHUNK)


@jax.vmap
def _picked(values: Array, order: Int[Array, "N"]) -> Array:
    """Entries of one device's positions; beyond the last one 0."""
    return values.at[order].get(mode="fill", fill_value=0, unique_indices=True)


def _of_each(
    head: Head, x: Float[Array, "P C D"], targets: Int[Array, "P C"]
) -> Float[Array, "P C"]:
    """With all logits at once."""
    logits = head(x)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _of_positions(
    head: Head,
    x: Float[Array, "P C D"],
    targets: Int[Array, "P C"],
    mask: Bool[Array, "P C"],
    weights: Float[Array, "P C"] | None,
    scale: Partial | None,
) -> Float[Array, ""]:
    each = _of_each(head, x, targets)
    if scale is not None:
        still = jax.lax.stop_gradient(each)
        # The value stays, its gradient is scaled.
        each = still + jax.lax.stop_gradient(scale(still)) * (each - still)
    return jnp.where(mask, each if weights is None else weights * each, 0).sum()


@jax.custom_vjp
def _in_chunks(
    head: Head,
    x: Float[Array, "P N D"],
    targets: Int[Array, "P N"],
    mask: Bool[Array, "P N"],
    weights: Float[Array, "P N"] | None,
    scale: Partial | None,
) -> Float[Array, ""]:
    """The sum over chunks of the positions (axis 1), which are picked: those that do not count come last."""

    def add(i: Int[Array, ""], total: Float[Array, ""]) -> Float[Array, ""]:
        return total + _of_positions(head, *_chunk(i, (x, targets, mask, weights, scale)))

    return jax.lax.fori_loop(0, _turns(mask), add, jnp.zeros((), wide(x.dtype)))


def _with_gradient(
    head: Any, x: Any, targets: Any, mask: Any, weights: Any, scale: Any
) -> tuple[Float[Array, ""], Any]:
    """The sum, and its gradient by the positions, by their weights if they have any, and by the head's matrix where that is trained."""
    trained = head.matrix.perturbed
    head, *positions = custom_vjp_primal_tree_values((head, x, targets, mask, weights, scale))
    x, _, mask, weights, _ = positions
    wanted = (*((0,) if trained else ()), 1, *(() if weights is None else (4,)))

    def add(i: Int[Array, ""], carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        total, by_head, by_each = carry
        pieces = _chunk(i, positions)
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


def _scaled(gradients: tuple[Any, Any], by: Any) -> tuple[Any, Any, None, None, Any, None]:
    if isinstance(by, SymbolicZero):
        return None, None, None, None, None, None
    # In the wide dtype: rounded to bfloat16 the factor would be off by as much for every entry.
    by_head, (by_x, *by_weights) = jax.tree.map(
        lambda g: (g.astype(by.dtype) * by).astype(g.dtype), gradients
    )
    return by_head, by_x, None, None, by_weights[0] if by_weights else None, None


_in_chunks.defvjp(_with_gradient, _scaled, symbolic_zeros=True)


def _chunk(i: Int[Array, ""], arrays: Any) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * CHUNK, CHUNK, axis=1), arrays)


def _turns(mask: Bool[Array, "P N"]) -> Int[Array, ""]:
    """Chunks that hold a position that counts, on any device."""
    return -(-mask.sum(axis=1, dtype=jnp.int32).max() // CHUNK)
