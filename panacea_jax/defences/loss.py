"""The training loss, mean next-token cross-entropy over response tokens, with handles on the activations that lead to it.

With ``accumulate`` K a batch is taken as K micro-batches of every K-th row, one after the other, so that the activations of one exist at a
time. The outcome is that of the whole batch, token-weighted, whatever a method makes of it: the mean loss adds up sums over tokens and
divides once, and hidden states and readings are put together again before anybody sees them.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from panacea_jax.data.batches import Batch, deinterleave, interleave
from panacea_jax.defences.cross_entropy import summed_cross_entropy, token_cross_entropy
from panacea_jax.models.bound import SUMS, BoundDecoder, Inputs, Offsets, SomeOffsets
from panacea_jax.models.model import Model


class Forward(NamedTuple):
    """Outcome of a forward pass.

    Attributes:
        hidden: final hidden states, after the last norm.
        readings: by name the activations asked for, ``[L, B, T, D]``; sums over tokens by name and projection, ``[L, F]`` or ``[L, F, F]``.
    """

    hidden: Float[Array, "B T D"]
    readings: dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """``loss(params, batch)``: mean cross-entropy over the response tokens of the whole batch.

    A pytree, so that a jitted function can take it as an argument.

    Attributes:
        model: the static part; its ``weights`` are None.
        weights: the frozen base, or None where ``params`` holds all weights.
        remat: what the backward pass recomputes (``decoder.REMAT``); None: what the model was made for.
        accumulate: K, micro-batches that a batch is taken in; its rows are a multiple of it.
    """

    model: Model = dataclasses.field(metadata={"static": True})
    weights: Any
    remat: str | None = dataclasses.field(default=None, metadata={"static": True})
    accumulate: int = dataclasses.field(default=1, metadata={"static": True})

    @classmethod
    def of(cls, model: Model, accumulate: int = 1) -> "Loss":
        """The loss of a loaded model."""
        static = dataclasses.replace(model, weights=None)
        return cls(static, model.weights, accumulate=accumulate)

    def bind(self, params: Any) -> BoundDecoder:
        """The decoder at ``params``: its embedding, norm and logits."""
        return self.model.bind(self.weights, params)

    def __call__(
        self, params: Any, batch: Batch, offsets: Offsets | None = None
    ) -> Float[Array, ""]:
        """The mean loss; 0 for a batch without response tokens.

        Args:
            params: trainable tree.
            batch: tokens ``[B, T]``.
            offsets: added to the output of each attention module, before the residual. Their gradient is that of the modules' outputs.
        """
        if self.accumulate > 1:
            return _accumulated(self, params, batch, offsets)
        return self.mean(params, self.forward(params, batch, offsets).hidden, batch)

    def forward(
        self,
        params: Any,
        batch: Batch,
        offsets: Offsets | None = None,
        readings: tuple[str, ...] = (),
    ) -> Forward:
        """Hidden states and, of ``bound.READINGS`` and ``bound.SUMS``, the activations asked for."""
        if self.accumulate > 1:
            return _forward_in_parts(self, params, batch, offsets, readings)
        inputs = Inputs.of(
            batch.tokens, batch.valid, segments=batch.segments, dropout=batch.dropout, entering=batch.entering, right=True
        )  # fmt: skip
        return Forward(*self.bind(params).inspect(inputs, offsets, readings, self.remat))

    def hidden_states(
        self, params: Any, batch: Batch, readings: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "layers B T D"], dict[str, Any]]:
        """What transformers calls hidden states: of the embedding and each layer, the last behind the final norm. And readings."""
        out = self.forward(params, batch, None, ("block_out", *readings))
        first = self.bind(params).embed(batch.tokens)
        between = out.readings["block_out"][:-1]
        return jnp.concatenate([first[None], between, out.hidden[None]]), out.readings

    def mean(
        self,
        params: Any,
        hidden: Float[Array, "B T D"],
        batch: Batch,
        scale: Partial | None = None,
    ) -> Float[Array, ""]:
        """Mean loss of final hidden states; 0 for a batch without response tokens. ``scale`` is of each token's gradient, see
        ``summed_cross_entropy``."""
        total, tokens = self._sum(params, hidden, batch, scale=scale)
        return total / jnp.maximum(tokens, 1)

    def of_tokens(
        self, params: Any, hidden: Float[Array, "B T D"], batch: Batch
    ) -> Float[Array, "B T-1"]:
        """The loss of each token behind a row's first, 0 of those that are not to be predicted; not to be differentiated."""
        targets, mask = batch.tokens[:, 1:], batch.loss_mask[:, 1:]
        head = self.bind(params).decoder.head
        return token_cross_entropy(head, hidden[:, :-1], targets, mask, self.model.mesh)

    def summed(self, params: Any, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Cross-entropy summed over response tokens, and their number: what a mean over several batches is made of."""
        return self._sum(params, self.forward(params, batch).hidden, batch)

    def weighted(
        self,
        params: Any,
        hidden: Float[Array, "B T D"],
        batch: Batch,
        weights: Float[Array, "B T"],
    ) -> Float[Array, ""]:
        """``Σ_t c_t CE_t`` over response tokens, of final hidden states.

        Args:
            params: trainable tree.
            hidden: of the batch.
            batch: tokens ``[B, T]``.
            weights: c_t, of the token that is predicted; the gradient by one is that token's cross-entropy.
        """
        return self._sum(params, hidden, batch, weights)[0]

    def _sum(
        self,
        params: Any,
        hidden: Float[Array, "B T D"],
        batch: Batch,
        weights: Float[Array, "B T"] | None = None,
        scale: Partial | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        # Position t predicts token t + 1, so the mask is shifted by one; the last position predicts nothing.
        targets, mask = batch.tokens[:, 1:], batch.loss_mask[:, 1:]
        shifted = None if weights is None else weights[:, 1:]
        head, mesh = self.bind(params).decoder.head, self.model.mesh
        total = summed_cross_entropy(head, hidden[:, :-1], targets, mask, mesh, shifted, scale)
        return total, mask.sum().astype(total.dtype)


# ---- micro-batches


def _split_offsets(offsets: Offsets | None, count: int) -> Any:
    """By micro-batch: the values ``[K, L, B / K, T, D]``."""
    if offsets is None:
        return None
    values = offsets.values if isinstance(offsets, SomeOffsets) else offsets
    layers, rows, *rest = values.shape
    return values.reshape(layers, rows // count, count, *rest).transpose(2, 0, 1, 3, 4)


def _offsets_like(offsets: Offsets | None, values: Any) -> Any:
    """The same kind of offsets, of a micro-batch."""
    return offsets._replace(values=values) if isinstance(offsets, SomeOffsets) else values


def _accumulated(
    loss: Loss, params: Any, batch: Batch, offsets: Offsets | None
) -> Float[Array, ""]:
    """The mean loss, whose gradient is taken micro-batch by micro-batch along with it.

    Each micro-batch is passed through forward and backward before the next one begins, so its activations are gone by then, and what the
    backward pass finds is the sum of gradients, to be scaled. Nothing is computed twice.
    """
    count = loss.accumulate
    one = dataclasses.replace(loss, accumulate=1)
    parts = deinterleave(batch, count)
    tokens = jnp.maximum(batch.loss_mask[:, 1:].sum(), 1)

    def of_part(params: Any, values: Any, part: Batch) -> Float[Array, ""]:
        hidden = one.forward(params, part, _offsets_like(offsets, values)).hidden
        total = one._sum(params, hidden, part)[0]
        return total / tokens.astype(total.dtype)

    split = _split_offsets(offsets, count)
    one_part = jax.tree.map(lambda x: x[0], (split, parts))
    zero = jnp.zeros((), jax.eval_shape(of_part, params, *one_part).dtype)

    @jax.custom_vjp
    def mean(params: Any, values: Any) -> Float[Array, ""]:
        def add(total: Any, xs: Any) -> tuple[Any, None]:
            return total + of_part(params, *xs), None

        return jax.lax.scan(add, zero, (values, parts))[0]

    def forward(params: Any, values: Any) -> tuple[Float[Array, ""], Any]:
        def add(carry: Any, xs: Any) -> tuple[Any, Any]:
            total, sums = carry
            value, (by_params, by_values) = jax.value_and_grad(of_part, (0, 1))(params, *xs)
            return (total + value, jax.tree.map(jnp.add, sums, by_params)), by_values

        start = (zero, jax.tree.map(jnp.zeros_like, params))
        (total, sums), by_values = jax.lax.scan(add, start, (values, parts))
        return total, (sums, by_values)

    def backward(found: Any, scale: Float[Array, ""]) -> Any:
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), found)

    mean.defvjp(forward, backward)
    return mean(params, split)


def _forward_in_parts(
    loss: Loss, params: Any, batch: Batch, offsets: Offsets | None, readings: tuple[str, ...]
) -> Forward:
    """Hidden states and readings of all rows; the backward pass computes each micro-batch again."""
    one = dataclasses.replace(loss, accumulate=1)
    xs = (_split_offsets(offsets, loss.accumulate), deinterleave(batch, loss.accumulate))

    def body(_: None, xs: Any) -> tuple[None, Forward]:
        values, part = xs
        return None, one.forward(params, part, _offsets_like(offsets, values), readings)

    _, found = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, xs)
    joined = {
        # Sums over tokens [K, L, …] by projection; activations [K, L, B / K, T, D].
        name: jax.tree.map(lambda x: x.sum(axis=0), x) if name in SUMS
        else jax.vmap(interleave, in_axes=1)(x)
        for name, x in found.readings.items()
    }  # fmt: skip
    return Forward(interleave(found.hidden), joined)


@jax.jit
def sum_gradient(loss: Loss, params: Any, batch: Batch) -> tuple[Any, Float[Array, ""]]:
    """Gradient of the *summed* loss of a batch, and its number of response tokens."""
    return jax.grad(loss.summed, has_aux=True)(params, batch)


def mean_gradient(loss: Loss, params: Any, batches: Iterable[Batch]) -> Any:
    """Gradient of the mean loss over the response tokens of several batches together; zeros where they hold none."""
    total, tokens = None, jnp.zeros(())
    for batch in batches:
        gradient, count = sum_gradient(loss, params, batch)
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
        tokens = tokens + count
    return jax.tree.map(lambda x: x / jnp.maximum(tokens, 1), total)
