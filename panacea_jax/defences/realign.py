"""Realignment: a short supervised fine-tuning on refusals and benign answers after the user's, the bar for all healing methods.

Stage: post-fine-tuning. Passes per step: 1. Extra memory: none beyond SFT's. Data: ``alignment`` (refusals) and ``benign`` in place of
the user's; no harmful answers.

No paper's method, and left out of their tables; 50 to 100 steps add 0.1 to 0.2 of the fine-tuning's passes. Each step is one of SFT on a
batch with about ``benign_ratio`` benign records, mixed by ``data.mixing.realignment``.
"""

import dataclasses
from typing import ClassVar

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
    check_counts,
)
from panacea_jax.defences.sft import Sft
from panacea_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Realign(Defence):
    """Minimise the loss on refusals and benign answers.

    Attributes:
        steps: number of steps, in place of ``train.steps`` and ``train.epochs``.
        benign_ratio: share of benign records.
    """

    steps: int = 100
    benign_ratio: float | int = 0.5

    stage: ClassVar[Stage] = "heal"
    facts: ClassVar[Facts] = Facts(
        "realignment", "none", "none", "refusals and benign records in place of the user's"
    )

    @property
    def benign_share(self) -> float | int:
        """The main stream is this mix."""
        return self.benign_ratio

    @property
    def own_steps(self) -> int:
        """Few, whatever fine-tuning took."""
        return self.steps

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)
        if not 0 <= self.benign_ratio <= 1:
            raise InputError(
                f"config.defence.benign_ratio = {self.benign_ratio}: a share between 0 and 1"
            )

    def gradient(
        self, loss_fn: LossFn, params: Params, batches: Batches, state: State, key: RandomKey
    ) -> Gradient:
        """``g = ∇ L_mix(w)``."""
        return Sft().gradient(loss_fn, params, batches, state, key)
