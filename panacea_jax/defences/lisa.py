"""Lisa: user data and alignment data in turns, tied by a proximal term (arXiv 2405.18641, NeurIPS 2024).

    alignment state, K1 steps:     min_w  L_align(w) + ρ/2 ‖w − w_ref‖²
    fine-tuning state, K2 steps:   min_w  L_task(w)  + ρ/2 ‖w − w_ref‖²       w_ref = w at the last switch; then the other state again

Stage: fine-tuning. Passes per step: 1, on the batch of the state. Extra memory: w_ref. Extra data: ``alignment``.

Differs from SFT in the batches and in the term, which is off for the first tenth of training. Training begins in the alignment state,
with w_ref the starting point. The public code keeps the end points of both states; the one in use is always w at the last switch, so
one copy does. As there, one optimizer serves both states and a user batch is drawn and dropped on every alignment step; here an
alignment batch is dropped on every user step too, since the batch of step t is a function of t. K1 = 0 leaves SFT and K2 = 0 SFT on
alignment data, both tied to the starting point, as in the public code.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from panacea_jax.defences.protocol import (
    Batches,
    Defence,
    Facts,
    Gradient,
    LossFn,
    Params,
    RandomKey,
    Stage,
    StreamSpec,
    check_not_negative,
)
from panacea_jax.errors import InputError


class LisaState(NamedTuple):
    """What Lisa carries from step to step.

    Attributes:
        anchor: w_ref, a tree as ``params``.
        steps: number of steps taken; it says which state comes next.
    """

    anchor: Params
    steps: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Lisa(Defence):
    """The gradient of one state, ``∇ L(w) + ρ (w − w_ref)``.

    Attributes:
        rho: ρ, strength of the pull towards w_ref; 1 in Lisa's repository, 0.01 in Booster's.
        alignment_steps: K1, steps in a row on alignment batches.
        finetune_steps: K2, steps in a row on user batches.
        warmup_steps: steps before the proximal term acts. None: as the public code, steps t = 0, 1, … with t ≤ total/10.
    """

    rho: float | int = 1.0
    alignment_steps: int = 100
    finetune_steps: int = 900
    warmup_steps: int | None = None

    stage: ClassVar[Stage] = "finetune"
    facts: ClassVar[Facts] = Facts(
        title="Lisa",
        paper="arXiv 2405.18641",
        memory="w at the last switch",
        code="states, snapshots and warm-up reproduced, with one copy in place of two",
    )

    def __post_init__(self) -> None:
        check_not_negative(rho=self.rho)
        for name in ("alignment_steps", "finetune_steps", "warmup_steps"):
            if (steps := getattr(self, name)) is not None and steps < 0:
                raise InputError(f"config.defence.{name} = {steps}: 0 or more steps")
        if self.alignment_steps + self.finetune_steps == 0:
            raise InputError(
                "config.defence.finetune_steps = 0: with alignment_steps 0 too there is no step"
            )

    @property
    def passes(self) -> float:
        """The share of the steps that the fine-tuning state has, over whole turns."""
        return self.finetune_steps / (self.alignment_steps + self.finetune_steps)

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """Alignment records, for the other steps."""
        both = self.alignment_steps + self.finetune_steps
        return {"alignment": StreamSpec(passes=self.alignment_steps / both)}

    def for_steps(self, steps: int) -> "Lisa":
        """With the warm-up of a training of so many steps, unless it is set."""
        if self.warmup_steps is not None:
            return self
        return dataclasses.replace(self, warmup_steps=steps // 10 + 1)

    def init(self, params: Params) -> LisaState:
        """w_ref = w."""
        return LisaState(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))

    def gradient(
        self, loss_fn: LossFn, params: Params, batches: Batches, state: LisaState, key: RandomKey
    ) -> Gradient:
        """``∇ L(w) + ρ (w − w_ref)`` on the batch of the state that this step is in.

        Raises:
            ValueError: the warm-up is not known, see ``for_steps``.
        """
        if self.warmup_steps is None:
            raise ValueError("Lisa.warmup_steps: call for_steps with the number of steps first")
        turn = state.steps % (self.alignment_steps + self.finetune_steps)
        aligning = turn < self.alignment_steps
        anchor = state.anchor
        if self.alignment_steps and self.finetune_steps:
            switched = (turn == 0) | (turn == self.alignment_steps)
            anchor = jax.tree.map(lambda w, ref: jnp.where(switched, w, ref), params, anchor)

        # The two batches may differ in shape, so the choice is between gradients and not between batches.
        loss, g = jax.lax.cond(
            aligning,
            lambda w: jax.value_and_grad(loss_fn)(w, batches["alignment"]),
            lambda w: jax.value_and_grad(loss_fn)(w, batches["user"]),
            params,
        )
        pulling = state.steps >= self.warmup_steps
        drift = jax.tree.map(jnp.subtract, params, anchor)
        grads = jax.tree.map(lambda g, d: jnp.where(pulling, g + self.rho * d, g), g, drift)

        distance = optax.tree.norm(drift)
        metrics = {
            "loss": loss,
            "proximal": jnp.where(pulling, self.rho / 2 * jnp.square(distance), 0),
            "norm_drift": distance,
            "alignment_state": aligning.astype(loss.dtype),
        }
        return grads, LisaState(anchor, state.steps + 1), metrics
