"""LDIFS: fine-tuning that keeps the features where they were (arXiv 2308.13320).

    min_w  L_task(w) + Σ_l q_l       q_l = ρ/2 ‖F_l(w) − F_l(w₀)‖²,  counted while q_l < gate;  F_l the output of layer l's MLP

Stage: fine-tuning. Passes per step: 1½ (one more forward; 1⅓ where all parameters are trained).
Extra memory: the starting parameters w₀, and the features of both forwards, one ``[B, T, D]`` tensor a layer each. Extra data: none.

Differs from SFT in the penalty. The reference is the same base with the starting adapter: no second base in LoRA mode. Of the public
code are kept the sum over tokens and channels and the gate of 0.1, meant to drop overflow, which frees just the layers that drifted far.
Mended: no gradient is taken through the reference, and padding has no part (there it has), so the penalty does not depend on how a
batch is padded. ``gate=0`` is the variant without these defects: no gate, and the mean over tokens and channels in place of the sum, so
that ρ does not depend on the batch; there ρ means as much as ρ/(tokens · D) does in a sum.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from panacea_jax.defences.dropout import without_dropout
from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Anchor,
    Anchored,
    Batches,
    Facts,
    Gradient,
    Metrics,
    Params,
    RandomKey,
    Stage,
    check_not_negative,
)
from panacea_jax.errors import InputError
from panacea_jax.models.precision import wide

FEATURES = "mlp_out"


@dataclasses.dataclass(frozen=True)
class Ldifs(Anchored):
    """The gradient of the task loss and the distance in feature space.

    Attributes:
        rho: ρ, weight of the squared distance.
        gate: a layer counts while its q_l is below this; infinity: always. 0: always, and q_l is a mean and not a sum.
    """

    rho: float | int = 1e-4
    gate: float | int = 0.1

    stage: ClassVar[Stage] = "finetune"
    facts: ClassVar[Facts] = Facts(
        title="LDIFS",
        paper="arXiv 2308.13320",
        memory="starting parameters, two B×T×D tensors a layer",
        code="sum and gate reproduced; no gradient through the reference, no padding; gate 0 mends the rest",
    )
    reads_every_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_not_negative(rho=self.rho)
        if not self.gate >= 0:  # also false for NaN
            raise InputError(f"config.defence.gate = {self.gate}: 0 or more")

    @property
    def passes(self) -> float:
        """One more forward pass, of the reference."""
        return 3 / 2

    def _penalty(
        self,
        features: Float[Array, "L B T D"],
        reference: Float[Array, "L B T D"],
        valid: Bool[Array, "B T"],
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """``Σ_l q_l`` over the layers that count, and their number."""
        # Squares in float32: a sum over B·T·D of them is more than bfloat16 can count.
        drift = (features - reference).astype(wide(features.dtype))
        drift = jnp.where(valid[..., None], drift, 0)
        q = self.rho / 2 * jnp.sum(jnp.square(drift), axis=(1, 2, 3))
        if self.gate == 0:
            q = q / (jnp.maximum(valid.sum(), 1) * features.shape[-1])
            return q.sum(), jnp.asarray(len(q), q.dtype)
        counts = q < self.gate
        return jnp.where(counts, q, 0).sum(), counts.sum().astype(q.dtype)

    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: Anchor, key: RandomKey
    ) -> Gradient:
        """``∇ [L_task(w) + Σ_l q_l]``."""
        batch = batches["user"]
        still = without_dropout(batch)
        reference = loss_fn.forward(state.start, still, readings=(FEATURES,)).readings[FEATURES]

        def total(w: Params) -> tuple[Float[Array, ""], Metrics]:
            hidden, readings = loss_fn.forward(w, batch, readings=(FEATURES,))
            loss = loss_fn.mean(w, hidden, batch)
            penalty, counted = self._penalty(readings[FEATURES], reference, batch.valid)
            return loss + penalty, {"loss": loss, "penalty": penalty, "layers_counted": counted}

        grads, metrics = jax.grad(total, has_aux=True)(params)
        return grads, state, metrics
