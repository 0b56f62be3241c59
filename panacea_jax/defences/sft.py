"""Plain supervised fine-tuning: no defence, and the yardstick of every other.

Stage: any. Passes per step: 1 (forward + backward). Extra memory: none. Extra data: none.
"""

import dataclasses
from typing import ClassVar

import jax

from panacea_jax.defences.protocol import (
    Batches,
    Defence,
    Facts,
    Gradient,
    LossFn,
    Params,
    RandomKey,
    Stage,
    State,
)


@dataclasses.dataclass(frozen=True)
class Sft(Defence):
    """Minimise ``L_task(w)``."""

    stage: ClassVar[Stage] = "finetune"
    facts: ClassVar[Facts] = Facts("SFT", "none", "none", "also at the stage align")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Plain training also aligns."""
        return ("align", "finetune")

    def gradient(
        self, loss_fn: LossFn, params: Params, batches: Batches, state: State, key: RandomKey
    ) -> Gradient:
        """``g = ∇ L_task(w)``."""
        loss, g = jax.value_and_grad(loss_fn)(params, batches["user"])
        return g, state, {"loss": loss}
