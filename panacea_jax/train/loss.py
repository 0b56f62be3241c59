"""Mean next-token cross-entropy over the response tokens of the whole batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from panacea_jax.data.batches import Batch
from panacea_jax.models.model import Model


def summed_loss(
    model: Model, weights: Any, params: Any, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy summed over response tokens, and their number.

    Position t predicts token t + 1, so the mask is shifted by one; the logits of the last position predict nothing.
    """
    logits, _ = model.apply(weights, params, batch.tokens, valid=batch.valid)
    logits, targets, mask = logits[:, :-1], batch.tokens[:, 1:], batch.loss_mask[:, 1:]
    with jax.named_scope("cross_entropy"):
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - picked
        return jnp.where(mask, losses, 0).sum(), mask.sum().astype(losses.dtype)


def mean_loss(model: Model, weights: Any, params: Any, batch: Batch) -> Float[Array, ""]:
    """Mean over the response tokens of the batch; 0 for a batch that has none."""
    total, tokens = summed_loss(model, weights, params, batch)
    return total / jnp.maximum(tokens, 1)
