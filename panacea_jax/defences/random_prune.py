"""Random pruning: zeros at random places of the finished weights, the control that Antidote has to beat (its public code).

Stage: post-fine-tuning, one shot. Passes: none. Extra memory: one mask. Extra data: none.

Of each matrix of each layer ``int(size · dense_ratio)`` entries are set to 0, drawn anew for each. The matrices are those of Antidote:
an adapter's factors, or the kernels of q, k and v. The public code cuts that many of every trainable tensor, which with LoRA is each
factor of each layer, as here. Its draw is not reproduced: ours follows ``seed``.
"""

import dataclasses
import zlib
from typing import ClassVar

import jax
from jaxtyping import Array, Bool, Key

from panacea_jax.defences import pruning
from panacea_jax.defences.protocol import Facts, Method, Params, Stage, State


@dataclasses.dataclass(frozen=True)
class RandomPrune(Method):
    """Prune at random.

    Attributes:
        dense_ratio: share of the entries that is cut, as Antidote's.
        seed: of the draw.
    """

    dense_ratio: float | int = 0.1
    seed: int = 0

    stage: ClassVar[Stage] = "heal"
    facts: ClassVar[Facts] = Facts(
        title="random pruning",
        paper="ICML 2025 (Antidote's control)",
        memory="one mask",
        code="as many entries of each tensor as Antidote's code cuts, drawn by a seed of its own; of all weights only q, k and v",
    )

    def __post_init__(self) -> None:
        pruning.check_dense_ratio(self.dense_ratio)

    def finish(self, params: Params, state: State) -> Params:
        """``W ⊙ (1 − mask)``."""

        def mask(name: str, w: pruning.Matrix) -> pruning.Mask:
            # By name, so that a matrix keeps its mask whatever else is adapted.
            key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(name.encode()))
            count = int(w[0].size * self.dense_ratio)

            def of_layer(key: Key[Array, ""]) -> Bool[Array, "in out"]:
                return (jax.random.permutation(key, w[0].size) < count).reshape(w.shape[1:])

            return jax.jit(lambda keys: jax.lax.map(of_layer, keys))(
                jax.random.split(key, w.shape[0])
            )

        return pruning.prune(params, mask)

    def report(self, params: Params, state: State) -> dict[str, int]:
        """How much was cut."""
        return pruning.count_pruned(params, self.finish(params, state))
