"""Texts as the decoder takes them: tokens, positions, padding, and what is known of them besides."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Texts as the decoder takes them, padded to one length.

    Attributes:
        tokens: ids; those of padding do not matter.
        positions: position of each token in its text.
        valid: False for padding: no query sees it.
        segments: numbers of the texts that share a row; a query sees keys of its own only. None: one text a row.
        dropout: raw random key of each row, for the masks of the adapter's inputs. None: no dropout.
        entering: what enters the lowest adapted layer, where it is known: nothing below is computed then.
        right: texts begin where their rows do, so that padding stands behind them; a fused back-end then needs no mask.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    segments: Int[Array, "B T"] | None = None
    dropout: UInt32[Array, "B _"] | None = None
    entering: Float[Array, "B T D"] | None = None
    right: bool = False

    @classmethod
    def of(
        cls,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"] | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        dropout: UInt32[Array, "B _"] | None = None,
        entering: Float[Array, "B T D"] | None = None,
        first: int | Int[Array, "B 1"] = 0,
        right: bool = False,
    ) -> "Inputs":
        """With what is not given filled in.

        Args:
            tokens: ids.
            valid: by default all are.
            positions: by default each token's index in its segment, or else among the valid ones of its row, counted from ``first`` on.
            segments: by default one text a row.
            dropout: by default none.
            entering: by default it is computed.
            first: position of the first token.
            right: padding, if any, stands behind the texts.
        """
        if valid is None:
            valid = jnp.ones(tokens.shape, bool)
        if positions is None and segments is not None:
            positions = segment_positions(segments)
        elif positions is None:
            positions = default_positions(valid) + first
        return cls(tokens, positions, valid, segments, dropout, entering, right)


def default_positions(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of each token among the valid ones of its row; padding before the first gets 0."""
    return jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)


def segment_positions(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of each token within its segment, a run of equal numbers."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.diff(segments, axis=1, prepend=-1) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
