"""Inner products of trees, and a direction taken off others: what is left changes their losses by nothing, to first order."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

# Of a tree that others hold but for this share, what is left is rounding: a direction of no meaning, which nothing is to be made of.
DEPENDENT = 1e-5


def _less(tree: Any, factor: Float[Array, ""], other: Any) -> Any:
    """``tree − factor · other``."""
    return jax.tree.map(lambda x, y: x - factor.astype(x.dtype) * y, tree, other)


def inner(a: Any, b: Any) -> Float[Array, ""]:
    """⟨a, b⟩ over the leaves of two trees of one structure.

    ``optax.tree.vdot`` lays every leaf out as one long axis, and where devices share a leaf each of them then gathers all of it.
    """
    return optax.tree.sum(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))


def off_span(tree: Any, others: Sequence[Any]) -> Any:
    """``tree`` without its part in the span of ``others``, all of one structure; over all leaves together.

    Gram and Schmidt's way, each projection taken twice, after which nothing but rounding is left of it. Zeros, and trees that others hold
    already, span nothing; of a tree that lies in the span zeros are left.
    """
    basis: list[Any] = []
    for other in others:
        rest = _off_basis(other, basis)
        left = optax.tree.norm(rest)
        unit = jnp.where(left > 0, 1 / jnp.where(left > 0, left, 1.0), 0.0)
        basis.append(jax.tree.map(lambda x, unit=unit: x * unit.astype(x.dtype), rest))
    return _off_basis(tree, basis)


def _off_basis(tree: Any, basis: Sequence[Any]) -> Any:
    if not basis:
        return tree
    length = optax.tree.norm(tree)
    for unit in [*basis, *basis]:
        tree = _less(tree, inner(tree, unit), unit)
    rounding = optax.tree.norm(tree) <= DEPENDENT * length  # false for NaN, which stays to be seen
    return jax.tree.map(lambda x: jnp.where(rounding, 0, x), tree)
