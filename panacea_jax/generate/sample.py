"""The next token of a row: the most likely one, or one drawn by temperature and top-p (Holtzman et al., arXiv 1904.09751)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Sampling(NamedTuple):
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0: greedy.
        top_p: draw from the fewest most likely tokens that together have at least this probability.
    """

    temperature: float | int = 0.0
    top_p: float | int = 1.0


def row_keys(seed: int | Int[Array, ""], indices: Int[Array, "P"]) -> Key[Array, "P"]:
    """A key for each prompt, by the seed and its index in the set."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)


def truncated(
    logits: Float[Array, "B V"], temperature: float | int, top_p: float | int
) -> Float[Array, "B V"]:
    """Logits to draw from: at ``temperature``, and -inf for what is outside the nucleus. A token is inside if those more likely than it
    have less than ``top_p`` together; so the most likely one always is, and equal logits are inside or outside together.
    """
    logits = logits / temperature
    if top_p >= 1:
        return logits
    falling = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
    return jnp.where(
        logits >= jnp.take_along_axis(falling, jnp.maximum(last, 0), axis=-1), logits, -jnp.inf
    )


def first_largest(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """``argmax``, as two reductions that a CPU does several entries at a time; argmax itself goes entry by entry."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    number = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    first = jnp.min(jnp.where(logits == largest, number, logits.shape[-1]), axis=-1)
    return jnp.minimum(first, logits.shape[-1] - 1)  # NaN equals nothing


def next_token(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    position: Int[Array, "B"],
    sampling: Sampling,
) -> Int[Array, "B"]:
    """The next token of each row. A draw is a function of the row's logits, its key and its ``position`` in the text alone."""
    if sampling.temperature == 0:
        return first_largest(logits)
    logits = truncated(logits, sampling.temperature, sampling.top_p)
    now = jax.vmap(jax.random.fold_in)(keys, position)
    return jax.vmap(jax.random.categorical)(now, logits).astype(jnp.int32)
