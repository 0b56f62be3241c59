"""Magnitude pruning: cut the largest weights of each row; Antidote without its data (its public code with ``sample_num 0``).

    s_ij = |W_ij|        W_ij ← 0  where s_ij is at the top of row i

Stage: post-fine-tuning, one shot. Passes: none. Extra memory: one mask. Extra data: none.

Unlike pruning for size, which cuts the smallest. It shows what of Antidote's effect is due to the harmful data.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from panacea_jax.defences import pruning
from panacea_jax.defences.protocol import Facts, Method, Params, Stage, State


@dataclasses.dataclass(frozen=True)
class MagnitudePrune(Method):
    """Prune the largest entries of each row.

    Attributes:
        dense_ratio: share of each row that is cut, as Antidote's.
    """

    dense_ratio: float | int = 0.1

    stage: ClassVar[Stage] = "heal"
    facts: ClassVar[Facts] = Facts(
        title="magnitude pruning",
        paper="ICML 2025 (Antidote's control)",
        memory="one mask",
        code="Antidote's with sample_num 0",
    )

    def __post_init__(self) -> None:
        pruning.check_dense_ratio(self.dense_ratio)

    def finish(self, params: Params, state: State) -> Params:
        """``W ⊙ (1 − mask)``."""
        return pruning.prune(
            params, lambda name, w: pruning.top_of_rows(jnp.abs(w), self.dense_ratio)
        )

    def report(self, params: Params, state: State) -> dict[str, int]:
        """How much was cut."""
        return pruning.count_pruned(params, self.finish(params, state))
