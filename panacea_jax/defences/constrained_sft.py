"""Constrained SFT: the first tokens of an answer may not move far from the model's first answers (arXiv 2406.05946, ICLR 2025, eq. 3).

    min_w  mean_t −2/β_t · log σ(β_t (log π_w(y_t) − log π_0(y_t)))            over response tokens; t = 1, 2, … within an answer
    its gradient:   mean_t ω_t ∇(−log π_w(y_t)),   ω_t = max(2 (1 − σ(β_t (log π_w(y_t) − log π_0(y_t)))), 10⁻³)
    β_t = 5 β for t = 1,  20 β for t = 2 … 5,  β after that;  β = 0.1

Stage: fine-tuning. Passes per step: 1½ (one more forward; 1⅓ where all parameters are trained). Extra memory: the starting parameters
w₀. Extra data: none.

Differs from SFT in the weights ω alone. A token that has become likelier than it was counts less, the sooner the larger its β; at the
start all ω are 1. The loss that is logged is the plain one. π_0 is the same base with the starting adapter: no second base in LoRA mode.
The public code makes its log-probabilities once, in a table by record, and keeps no w₀. Here a batch does not say which records it
holds, so they are made again in each step: 1½ passes in place of 1 + 1/(2 E) over E epochs. In return both are of one and the same
batch, so that padding and rounding have no part in their difference, and nothing is kept over packing, micro-batches or resumption.

Reproduced of the public code: the floor 10⁻³, no gradient through ω, and the mean over all response tokens of a batch. Readings: t counts
the tokens that carry loss, so what a chat template opens each answer with (an empty thinking block) has the first places where it is
learnt; in a conversation t begins anew at every answer that is learnt, where the code counts on through the record (the paper has one
answer). Its scripts have Adam's β₁ at 0.5 besides, which is the optimizer's: ``config.optimizer.b1``.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from panacea_jax.defences.dropout import without_dropout
from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Anchor,
    Anchored,
    Batches,
    Facts,
    Gradient,
    Params,
    RandomKey,
    Stage,
    check_not_negative,
)

LEAST = 1e-3


def token_weight(beta: Array, loss_start: Array, loss: Array) -> Array:
    """ω of each token: ``max(2 (1 − σ(β (log π − log π_0))), 10⁻³)``, with ``loss = −log π``."""
    return jnp.maximum(2 * jax.nn.sigmoid(beta * (loss - loss_start)), LEAST)


def place_in_answer(learnt: Bool[Array, "B T"]) -> Array:
    """t of each token that is learnt, 1 where one begins that follows a token that is not; 0 elsewhere."""
    seen = jnp.cumsum(learnt, axis=1)
    return seen - jax.lax.cummax(jnp.where(learnt, 0, seen), axis=1)


@dataclasses.dataclass(frozen=True)
class ConstrainedSft(Anchored):
    """The gradient of the task loss, each token's weighed by how far it has moved.

    Attributes:
        beta: β, of the tokens behind the early ones. 0: plain SFT.
        first_factor: by which that of an answer's first token is larger.
        early_factor: likewise, of the other early ones.
        early_tokens: how many are early, the first included.
    """

    beta: float | int = 0.1
    first_factor: float | int = 5.0
    early_factor: float | int = 20.0
    early_tokens: int = 5

    stage: ClassVar[Stage] = "finetune"
    facts: ClassVar[Facts] = Facts(
        title="Constrained SFT",
        paper="arXiv 2406.05946",
        memory="starting parameters",
        code="weights and their floor reproduced; π₀ by a forward pass a step, no table; every answer of a conversation has a first token",
    )

    def __post_init__(self) -> None:
        check_not_negative(
            beta=self.beta,
            first_factor=self.first_factor,
            early_factor=self.early_factor,
            early_tokens=self.early_tokens,
        )

    @property
    def passes(self) -> float:
        """One more forward pass, of π_0."""
        return 3 / 2

    def _betas(self, learnt: Bool[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T"]:
        """β_t."""
        t = place_in_answer(learnt)
        early = jnp.where(t == 1, self.first_factor, self.early_factor)
        return (self.beta * jnp.where(t <= self.early_tokens, early, 1)).astype(dtype)

    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: Anchor, key: RandomKey
    ) -> Gradient:
        """``mean_t ω_t ∇(−log π_w(y_t))``."""
        batch, start = batches["user"], state.start
        loss_start = loss_fn.of_tokens(
            start, loss_fn.forward(start, without_dropout(batch)).hidden, batch
        )
        learnt = batch.loss_mask[:, 1:]
        weight = Partial(token_weight, self._betas(learnt, loss_start.dtype), loss_start)

        def weighed(w: Params) -> Float[Array, ""]:
            return loss_fn.mean(w, loss_fn.forward(w, batch).hidden, batch, weight)

        loss, grads = jax.value_and_grad(weighed)(params)
        mean_start = loss_start.sum() / jnp.maximum(learnt.sum(), 1)
        return grads, state, {"loss": loss, "loss_start": mean_start.astype(loss.dtype)}
