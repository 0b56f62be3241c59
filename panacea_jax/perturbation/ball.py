"""Put a gradient on the ρ-sphere, or keep an iterate inside the ρ-ball.

ρ is a scalar (one L2 budget over every leaf of the tree together) or an array ``[L]`` (one budget a layer; every leaf is then
stacked over layers on its first axis, as adapters are).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Radius = float | int | Float[Array, ""] | Float[Array, "layers"]

# Added to the norm, not to its square, as the reference code of Panacea does: a zero gradient gives ε = 0.
NORM_GUARD = 1e-7


def norms(tree: Any, per_layer: bool = False) -> Float[Array, ""] | Float[Array, "layers"]:
    """L2 norm over all leaves together: one number, or ``[L]`` with one number a layer."""
    if not per_layer:
        return optax.tree.norm(tree)
    squares = [jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def _scale(tree: Any, factor: Array) -> Any:
    """Multiply every leaf by a scalar, or layer by layer by ``[L]``."""
    return jax.tree.map(
        lambda x: x * factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim)).astype(x.dtype),
        tree,
    )


def _is_per_layer(rho: Radius) -> bool:
    return jnp.ndim(rho) == 1


def to_sphere(rho: Radius) -> optax.GradientTransformation:
    """The steepest ascent step of length ρ: ``ε = ρ h / (‖h‖ + 1e-7)`` (Panacea, arXiv 2501.18100, the inner maximum to first order).

    Args:
        rho: radius, a scalar over the whole tree or ``[L]`` per layer.

    Returns:
        A stateless transformation; zero gradients map to zero, never to NaN.
    """

    def update(h: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        length = norms(h, _is_per_layer(rho))
        return _scale(h, jnp.asarray(rho, length.dtype) / (length + NORM_GUARD)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def onto_ball(rho: Radius) -> optax.GradientTransformation:
    """Project the iterate back onto the ρ-ball: after ``apply_updates(ε, u)`` the new ε has ‖ε‖ ≤ ρ.

    Put it last in a chain, ``optax.chain(optax.sgd(-0.1), onto_ball(rho))``, and hand ε to ``update`` as ``params``: the updates that
    come out are ``proj(ε + u) − ε``.

    Raises:
        ValueError: ``update`` was called without ``params``.
    """

    def project(tree: Any) -> Any:
        if not _is_per_layer(rho):
            # A radius of exactly 0 would divide 0 by 0 at ε = 0.
            return optax.projections.projection_l2_ball(tree, jnp.maximum(rho, 1e-15))
        length = norms(tree, per_layer=True)
        # A layer inside its ball keeps its values exactly; the guarded division never sees a zero.
        outside = length > rho
        return _scale(tree, jnp.where(outside, rho / jnp.where(outside, length, 1.0), 1.0))

    def update(u: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise ValueError("onto_ball needs the current ε: pass it to update() as params")
        projected = project(optax.apply_updates(params, u))
        return jax.tree.map(jnp.subtract, projected, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
