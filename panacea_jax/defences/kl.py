"""KL: fine-tuning that stays near the model's first answers (a baseline in the code of Vaccine, arXiv 2402.01109).

    min_w  L_task(w) + λ · 1/B Σ_t D( p_t(w₀) ‖ p_t(w) )              t: the positions of L_task; B: records in the batch

Stage: fine-tuning. Passes per step: 1½ (one more forward; 1⅓ where all parameters are trained).
Extra memory: the starting parameters w₀, and a second ``[B, T, V]`` of logits. Extra data: none.

Differs from SFT in the penalty. The teacher is the same base with the starting adapter: no second base in LoRA mode. Direction and scale
are those of PyTorch's ``KLDivLoss(reduction="batchmean")`` given (student, teacher): the divergence of the student *from the teacher*,
summed over positions and divided by the number of records. Mended: the public code takes its softmax over the sequence and not over
the vocabulary, and over all positions; here only those count that predict a response token, so padding and prompts have no part.
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


def divergence(
    student: Float[Array, "B T V"], teacher: Float[Array, "B T V"], counts: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """``D(teacher ‖ student)`` of two sets of logits, 0 where a position does not count."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return jnp.where(counts, jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), 0)


@dataclasses.dataclass(frozen=True)
class Kl(Anchored):
    """The gradient of the task loss and the divergence from the start.

    Attributes:
        lam: λ, weight of the divergence.
    """

    lam: float | int = 0.1

    stage: ClassVar[Stage] = "finetune"
    facts: ClassVar[Facts] = Facts(
        title="KL",
        paper="in the code of arXiv 2402.01109",
        memory="starting parameters, B×T×V logits",
        code="direction and scale reproduced; softmax over the vocabulary, response positions only",
    )

    def __post_init__(self) -> None:
        check_not_negative(lam=self.lam)

    @property
    def passes(self) -> float:
        """One more forward pass, of the teacher."""
        return 3 / 2

    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: Anchor, key: RandomKey
    ) -> Gradient:
        """``∇ [L_task(w) + λ D]``."""
        batch = batches["user"]
        records = jnp.maximum(batch.records, 1)

        def logits(w: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T-1 V"]:
            # Position t predicts token t + 1; the last one predicts nothing.
            return loss_fn.bind(w).logits(hidden[:, :-1])

        teacher = logits(state.start, loss_fn.forward(state.start, without_dropout(batch)).hidden)

        def total(w: Params) -> tuple[Float[Array, ""], Metrics]:
            hidden = loss_fn.forward(w, batch).hidden
            loss = loss_fn.mean(w, hidden, batch)
            apart = divergence(logits(w, hidden), teacher, batch.loss_mask[:, 1:])
            kl = apart.sum() / records
            return loss + self.lam * kl, {"loss": loss, "kl": kl}

        grads, metrics = jax.grad(total, has_aux=True)(params)
        return grads, state, metrics
