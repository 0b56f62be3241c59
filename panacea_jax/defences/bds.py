"""BDS, Bayesian Data Scheduler: one learnt weight for each of the user's records (arXiv 2510.27172, NeurIPS 2025).

    min_{w, z}  L_align(w) + 1/B Σ_i σ_i(z) ℓ_i(w)           i: the B user records of the batch, of N
    σ(z) = N · softmax(z)     or 2 / (1 + e^{−z})            each 1 where all z_i = 0, as at the start

Stage: fine-tuning. Passes per step: 2, one on the user's batch and one on an alignment batch. Extra memory: three numbers for each user
record, and a second gradient. Extra data: ``alignment``.

ℓ_i is the mean cross-entropy of record i's response tokens, and L_align the mean of the same over an alignment batch. Differs from SFT in
both, in the weights, and in that the batch says which records are in it. A record whose loss stays high while the model is held at its
alignment data loses weight. By softmax that is relative: a record below the weighted mean loss gains what those above it lose; by the
sigmoid all weights fall, each at its own rate.

Read from the abstract and the public code, which differ in one thing: the paper samples the posterior of (w, z) by Langevin steps, each a
gradient step with noise, and the code has no noise. As the code does, this steps z by Adam (0.9, 0.95) at a constant rate, without decay,
and w by the shared tail, both by the losses at the w and z that the step began with. Left out of the code: a clip of z's gradient at norm
10, priors on the weights (off there), the network in place of free logits. A record without response tokens has loss 0 here, NaN there.
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from panacea_jax.data.batches import Batch
from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Batches,
    Defence,
    Facts,
    Gradient,
    Params,
    RandomKey,
    Stage,
    StreamSpec,
    check_not_negative,
)
from panacea_jax.errors import InputError
from panacea_jax.models.precision import wide

# A record of less than this weight is suspected; so many are named, those of least weight.
SUSPECTED, NAMED = 0.5, 100

_ADAM = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8)


class BdsState(NamedTuple):
    """What is learnt of the user's records.

    Attributes:
        logits: z ``[N]``, by the records' numbers.
        adam: moments of their gradients.
    """

    logits: Float[Array, "N"]
    adam: optax.OptState


@dataclasses.dataclass(frozen=True)
class Bds(Defence):
    """The gradient of the alignment loss and of the weighted losses of the user's records, whose weights are learnt beside.

    Attributes:
        logit_rate: learning rate of the logits; 0: all weights stay 1.
        weighting: σ, "softmax" or "sigmoid".
    """

    logit_rate: float | int = 5e-3
    weighting: Literal["softmax", "sigmoid"] = "softmax"
    _records: int = 0  # N, told by ``for_records``

    stage: ClassVar[Stage] = "finetune"
    facts: ClassVar[Facts] = Facts(
        title="BDS",
        paper="arXiv 2510.27172",
        memory="3 numbers a user record, a second gradient",
        code="scalar scheduler reproduced: Adam, no Langevin noise; without its clip of the logits' gradient and its priors",
    )

    def __post_init__(self) -> None:
        check_not_negative(logit_rate=self.logit_rate)
        if self.weighting not in ("softmax", "sigmoid"):
            raise InputError(f"config.defence.weighting = {self.weighting!r}: 'softmax' or 'sigmoid'")

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """Alignment records."""
        return {"alignment": StreamSpec(passes=1)}

    def for_records(self, records: int) -> "Bds":
        """With a logit for each of so many records."""
        return dataclasses.replace(self, _records=records)

    def init(self, params: Params) -> BdsState:
        """Every record has weight 1."""
        logits = jnp.zeros(self._records, wide(jax.tree.leaves(params)[0].dtype))
        return BdsState(logits, _ADAM.init(logits))

    def _weights(self, logits: Float[Array, "N"]) -> Float[Array, "N"]:
        """σ(z)."""
        if self.weighting == "sigmoid":
            return 2 * jax.nn.sigmoid(logits)
        return len(logits) * jax.nn.softmax(logits)

    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: BdsState, key: RandomKey
    ) -> Gradient:
        """``∇_w [L_align + mean σ_i ℓ_i]``, and a step of the logits along ``−∇_z``.

        Raises:
            ValueError: the batch does not say which records are in it, see ``for_records``.
        """
        user, safe = batches["user"], batches["alignment"]
        if user.numbers is None:
            raise ValueError("Bds: call for_records, and number the user's stream")
        dtype = state.logits.dtype

        def total(w: Params, batch: Batch, shares: Float[Array, "B T"]) -> Float[Array, ""]:
            return loss_fn.weighted(w, loss_fn.forward(w, batch).hidden, batch, shares)

        # mean σ_i ℓ_i is linear in the share that each token has in it, so its gradient by the shares is every token's loss, and that by z
        # follows from these: nothing is passed through twice.
        shares, back = jax.vjp(
            lambda z: self._weights(z)[user.numbers] * _shares(user, dtype), state.logits
        )
        weighted, (g, losses) = jax.value_and_grad(total, (0, 2))(params, user, shares)
        safe_loss, s = jax.value_and_grad(total)(params, safe, _shares(safe, dtype))
        grads = jax.tree.map(jnp.add, g, s)

        (by_logits,) = back(losses)
        step, adam = _ADAM.update(by_logits, state.adam)
        logits = state.logits - self.logit_rate * step

        weights = self._weights(logits)
        loss = losses.sum() / jnp.maximum(user.loss_mask[:, 1:].sum(), 1)
        metrics = {"loss": loss, "weighted_loss": weighted, "alignment_loss": safe_loss,
                   "weight_least": weights.min(), "weight_most": weights.max()}  # fmt: skip
        return grads, BdsState(logits, adam), metrics

    def record_weights(self, state: BdsState) -> Float[Array, "N"]:
        """σ(z)."""
        return self._weights(state.logits)

    def report(self, params: Params, state: BdsState) -> dict[str, Any]:
        """How many records are suspected, and the numbers (from 1) of those of least weight, the least first."""
        weights = np.asarray(self.record_weights(state))
        below = np.argsort(weights, kind="stable")[: int((weights < SUSPECTED).sum())]
        return {"suspected": len(below), "suspected_records": (below[:NAMED] + 1).tolist()}


def _shares(batch: Batch, dtype: Any) -> Float[Array, "B T"]:
    """What each token's loss counts in the mean over records of the mean over a record's response tokens."""
    counted = batch.loss_mask.at[:, 0].set(False)
    if batch.segments is None:
        tokens = counted.sum(axis=1, keepdims=True)
    else:
        same = batch.segments[:, :, None] == batch.segments[:, None, :]
        tokens = (same & counted[:, None, :]).sum(axis=2)
    share = 1 / jnp.maximum(tokens * batch.records, 1).astype(dtype)
    return jnp.broadcast_to(share, counted.shape)
