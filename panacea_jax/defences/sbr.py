"""SBR: fine-tuning that holds what the output head sees at the end of a few harmful prompts (arXiv 2605.05995, ICML 2026).

    min_w  L_task(w) + λ · mean_{i ≤ K, d ≤ D} (H_i(w) − H_i(w₀))²_d           H_i: final hidden state at the last token of prompt i

Stage: fine-tuning. Passes per step: 1, and 1 over K prompts; before the first step ½ over these. Extra memory: H(w₀), K × D numbers. Extra
data: the first K prompts of ``harmful``, whose answers are not read and need not be there.

Differs from SFT in the penalty. H(w₀) is made once and is state, so a resumed run holds the same. Every step sees the same K prompts,
whatever ``config.train.harmful_batch_size``; tables of passes count these K short rows as one batch.

Readings, all those of the public code: H is behind the last norm, what the head multiplies (transformers' last hidden state); a prompt's
last token is the one that an answer's first is predicted from, so the template's opening of the answer is part of the prompt; the mean
is over prompts and channels, in float32. There eight prompts are written into the code; here they are the defender's own.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from panacea_jax.data.batches import Batch
from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Batches,
    Defence,
    Facts,
    Gradient,
    Metrics,
    Params,
    RandomKey,
    Sets,
    Stage,
    StreamSpec,
    check_counts,
    check_not_negative,
)
from panacea_jax.models.adapter import Adapter
from panacea_jax.models.precision import wide


class SbrState(NamedTuple):
    """What SBR compares with.

    Attributes:
        start: H(w₀), in at least float32.
    """

    start: Float[Array, "K D"]


def prompt_ends(loss: Loss, params: Params, batch: Batch) -> Float[Array, "B D"]:
    """Final hidden state at the last token of each row's prompt: before its first answer, or the last one of all."""
    hidden = loss.forward(params, batch).hidden
    learnt, length = batch.loss_mask, batch.valid.sum(axis=1)
    prompt = jnp.where(learnt.any(axis=1), jnp.argmax(learnt, axis=1), length)
    last = jnp.maximum(prompt - 1, 0)  # of a row of padding any
    ends = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return ends.astype(wide(ends.dtype))


@dataclasses.dataclass(frozen=True)
class Sbr(Defence):
    """The gradient of the task loss and the squared drift of the prompts' ends.

    Attributes:
        lam: λ, weight of the drift.
        prompts: K, harmful prompts that are held.
    """

    lam: float | int = 50.0
    prompts: int = 8

    stage: ClassVar[Stage] = "finetune"
    facts: ClassVar[Facts] = Facts(
        title="SBR",
        paper="arXiv 2605.05995",
        memory="K×D numbers, activations of K prompts",
        code="loss reproduced; the prompts are the defender's, not those written into the code",
    )

    def __post_init__(self) -> None:
        check_not_negative(lam=self.lam)
        check_counts(prompts=self.prompts)

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """The same few harmful prompts in every step, and a forward pass over them before."""
        held = StreamSpec(passes=1, single_batches=0.5, first=self.prompts, prompts=True)
        return {"harmful": held}

    def init(self, params: Params) -> SbrState:
        """Nothing seen yet."""
        full = not isinstance(params, Adapter)
        width = params["embed_tokens"]["embedding"].shape[1] if full else params.width
        return SbrState(jnp.zeros((self.prompts, width), wide(jax.tree.leaves(params)[0].dtype)))

    def first_pass(self, loss: Loss, params: Params, sets: Sets, state: SbrState) -> SbrState:
        """H(w₀)."""
        ends = jax.jit(prompt_ends)(loss, params, next(iter(sets["harmful"])))
        return SbrState(ends[: self.prompts].astype(state.start.dtype))

    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: SbrState, key: RandomKey
    ) -> Gradient:
        """``∇ [L_task(w) + λ mean (H(w) − H(w₀))²]``."""
        user, held = batches["user"], batches["harmful"]
        rows = min(self.prompts, len(held.tokens))  # beyond them a batch is filled up with padding
        there = held.valid[:rows].any(axis=1)

        def total(w: Params) -> tuple[Float[Array, ""], Metrics]:
            loss = loss_fn(w, user)
            moved = prompt_ends(loss_fn, w, held)[:rows] - state.start[:rows]
            moved = jnp.where(there[:, None], moved, 0)
            drift = jnp.square(moved).sum() / (jnp.maximum(there.sum(), 1) * moved.shape[1])
            return loss + self.lam * drift, {"loss": loss, "drift": drift}

        grads, metrics = jax.grad(total, has_aux=True)(params)
        return grads, state, metrics
