"""Plain supervised fine-tuning: no defence, and the yardstick of every other.

Stage: any. Passes per step: 1 (forward + backward). Extra memory: none. Extra data: none.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Key

from panacea_jax.defences.protocol import Facts, Gradient, LossFn, Params, Stage, State


@dataclasses.dataclass(frozen=True)
class Sft:
    """Minimise ``L_task(w)``."""

    stage: ClassVar[Stage] = "finetune"
    streams: ClassVar[tuple[str, ...]] = ()
    facts: ClassVar[Facts] = Facts("SFT", "none", {"user": 1}, "none", "also at the stage align")

    def init(self, params: Params) -> State:
        """Nothing to remember."""
        return ()

    def gradient(
        self,
        loss_fn: LossFn,
        params: Params,
        batches: Mapping[str, Any],
        state: State,
        key: Key[Array, ""],
    ) -> Gradient:
        """``g = ∇ L_task(w)``."""
        loss, g = jax.value_and_grad(loss_fn)(params, batches["user"])
        return g, state, {"loss": loss}

    def finish(self, params: Params, state: State) -> Params:
        """``w`` as trained."""
        return params
