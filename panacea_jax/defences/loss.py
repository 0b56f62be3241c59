"""The training loss, mean next-token cross-entropy over response tokens, with handles on the activations that lead to it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from panacea_jax.data.batches import Batch
from panacea_jax.models.decoder import Offsets
from panacea_jax.models.model import Model

# Positions whose logits exist at a time: [B, T, V] of a vocabulary of 256k would outweigh all else that a step holds.
CHUNK = 32


class Forward(NamedTuple):
    """Outcome of a forward pass.

    Attributes:
        hidden: final hidden states, after the last norm.
        readings: by name the activations asked for, ``[L, B, T, D]``; sums of squares by name and projection, ``[L, F]``.
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
    """

    model: Model = dataclasses.field(metadata={"static": True})
    weights: Any
    remat: str | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of(cls, model: Model) -> "Loss":
        """The loss of a loaded model."""
        return cls(dataclasses.replace(model, weights=None), model.weights)

    def __call__(
        self, params: Any, batch: Batch, offsets: Offsets | None = None
    ) -> Float[Array, ""]:
        """The mean loss; 0 for a batch without response tokens.

        Args:
            params: trainable tree.
            batch: tokens ``[B, T]``.
            offsets: added to the output of each attention module, before the residual. Their gradient is that of the modules' outputs.
        """
        return self.mean(params, self.forward(params, batch, offsets).hidden, batch)

    def forward(
        self,
        params: Any,
        batch: Batch,
        offsets: Offsets | None = None,
        readings: tuple[str, ...] = (),
    ) -> Forward:
        """Hidden states and, of ``decoder.READINGS`` and ``decoder.SQUARES``, the activations asked for."""
        inputs = (self.weights, params, batch.tokens, batch.valid)
        return Forward(*self.model.inspect(*inputs, offsets, readings, self.remat, batch.segments))

    def hidden_states(
        self, params: Any, batch: Batch, readings: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "layers B T D"], dict[str, Any]]:
        """What transformers calls hidden states: of the embedding and each layer, the last behind the final norm. And readings."""
        out = self.forward(params, batch, None, ("block_out", *readings))
        first = self.model.embed(self.weights, params, batch.tokens)
        between = out.readings["block_out"][:-1]
        return jnp.concatenate([first[None], between, out.hidden[None]]), out.readings

    def norm(self, params: Any, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The final norm, of the hidden states of any layer."""
        return self.model.norm(self.weights, params, hidden)

    def logits(self, params: Any, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of final hidden states."""
        return self.model.logits(self.weights, params, hidden)

    def mean(self, params: Any, hidden: Float[Array, "B T D"], batch: Batch) -> Float[Array, ""]:
        """Mean loss of final hidden states; 0 for a batch without response tokens."""
        total, tokens = self._sum(params, hidden, batch)
        return total / jnp.maximum(tokens, 1)

    def summed(self, params: Any, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Cross-entropy summed over response tokens, and their number: what a mean over several batches is made of."""
        return self._sum(params, self.forward(params, batch).hidden, batch)

    def _sum(
        self, params: Any, hidden: Float[Array, "B T D"], batch: Batch
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        # Position t predicts token t + 1, so the mask is shifted by one; the last position predicts nothing.
        parts = (hidden[:, :-1], batch.tokens[:, 1:], batch.loss_mask[:, 1:])

        def part(
            x: Float[Array, "B C D"], targets: Int[Array, "B C"], mask: Bool[Array, "B C"]
        ) -> Float[Array, ""]:
            logits = self.logits(params, x)
            picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - picked, 0).sum()

        with jax.named_scope("cross_entropy"):
            total = part(*parts) if num_chunks(parts[1].shape[1]) <= 1 else _in_chunks(part, parts)
            return total, parts[2].sum().astype(total.dtype)


def num_chunks(positions: int) -> int:
    """Pieces in which the loss takes so many positions."""
    return -(-positions // CHUNK)


def _in_chunks(
    part: Callable[..., Float[Array, ""]], arrays: tuple[Array, ...]
) -> Float[Array, ""]:
    """Sum of ``part`` over chunks of the positions (axis 1), each computed again in the backward pass.

    Padding at the end is zeros, hence masked.
    """

    def cut(x: Array) -> Array:
        count = num_chunks(x.shape[1])
        x = jnp.pad(x, [(0, 0), (0, count * CHUNK - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, CHUNK, *x.shape[2:]), 1, 0)

    chunks = tuple(map(cut, arrays))
    zero = jnp.zeros((), jax.eval_shape(part, *(c[0] for c in chunks)).dtype)

    def add(total: Float[Array, ""], chunk: Any) -> tuple[Float[Array, ""], None]:
        return total + part(*chunk), None

    return jax.lax.scan(jax.checkpoint(add, prevent_cse=False), zero, chunks)[0]


@jax.jit
def sum_gradient(loss: Loss, params: Any, batch: Batch) -> tuple[Any, Float[Array, ""]]:
    """Gradient of the *summed* loss of a batch, and its number of response tokens."""
    return jax.grad(loss.summed, has_aux=True)(params, batch)
