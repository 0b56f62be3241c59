"""Antidote: cut out the weights that matter most on harmful data, after fine-tuning (ICML 2025).

    a_j = mean over records of  Σ_t x_tj²        s_ij = |W_ij| · √a_j        W_ij ← 0  where s_ij is at the top of row i

Stage: post-fine-tuning, one shot. Passes: one forward over each calibration set, no step. Extra memory: the statistics, one number per
input feature and layer, whatever the size of the set. Extra data: ``harmful``; with the safety mask also ``alignment``.

The score is Wanda's (Sun et al., arXiv 2306.11695), turned round: the highest are cut. x is the input of the matrix over the whole text,
prompt and response: for A of an adapter that of the projection, for B the r numbers ``x A``. All layers are scored before any is pruned.
With all parameters the kernels of q, k and v are pruned. Differs from the public code (github.com/git-disl/Antidote, an unofficial
re-implementation): it keeps the inputs of all records, here only sums are kept; its ``sample_num 0`` is the method ``magnitude_prune``;
its safety mask is made at the alignment stage, ours on the weights that are healed.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from panacea_jax.data.batches import Batch
from panacea_jax.defences import pruning
from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import Facts, Method, Params, Sets, Stage, StreamSpec

Squares = dict[str, Float[Array, "L in"]]


class AntidoteState(NamedTuple):
    """Statistics ``a`` by name of the matrix; empty before the calibration sets were seen.

    Attributes:
        harmful: of the harmful set.
        alignment: of the alignment set, with the safety mask.
    """

    harmful: Squares
    alignment: Squares


@jax.jit
def _sums(loss: Loss, params: Params, batch: Batch) -> tuple[Squares, Int[Array, ""]]:
    """``Σ x²`` over the tokens of a batch by name of the matrix, and the number of records."""
    depth, numbers = loss.model.config.num_layers, getattr(params, "numbers", None)
    seen = loss.forward(params, batch, None, ("input_squares", "low_squares")).readings
    sums = {}
    for name in pruning.pruned_matrices(params):
        projection, _, factor = name.removeprefix("layers.").rpartition(".")
        found = seen["low_squares" if factor == "b" else "input_squares"][projection]
        # Readings end with the last layer, and begin with the first or with the lowest adapted one.
        own = None if numbers is None else jnp.asarray(numbers) - (depth - len(found))
        sums[name] = found if own is None else found[own]
    return sums, batch.records


def mean_squares(loss: Loss, params: Params, batches: Iterable[Any]) -> Squares:
    """``a``: the mean over records of ``Σ_t x_tj²``, carried along from batch to batch."""
    mean: Squares = {}
    total = 0
    for batch in batches:
        sums, records = _sums(loss, params, batch)
        total += int(records)
        mean = {
            name: mean[name] + (s - records * mean[name]) / total if mean else s / total
            for name, s in sums.items()
        }
    return mean


@dataclasses.dataclass(frozen=True)
class Antidote(Method):
    """Prune by Wanda's score on harmful data.

    Attributes:
        dense_ratio: α, share of each row that is cut. 0.1 is the public code's default; its GSM8K, AG News and model scripts set 0.05.
        safety_mask: spare what the same score on the alignment set would cut too.
    """

    dense_ratio: float | int = 0.1
    safety_mask: bool = False

    stage: ClassVar[Stage] = "heal"
    facts: ClassVar[Facts] = Facts(
        title="Antidote",
        paper="ICML 2025",
        memory="one number per input feature and layer",
        code="score, mask and their order reproduced; sums in place of all inputs; the safety mask is made on the healed weights",
    )

    def __post_init__(self) -> None:
        pruning.check_dense_ratio(self.dense_ratio)

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """The calibration sets, a forward pass over each: ``harmful``, and ``alignment`` with the safety mask."""
        names = ("harmful", "alignment") if self.safety_mask else ("harmful",)
        return dict.fromkeys(names, StreamSpec(whole_passes=1 / 2))

    def init(self, params: Params) -> AntidoteState:
        """Nothing seen yet."""
        return AntidoteState({}, {})

    def first_pass(
        self, loss: Loss, params: Params, sets: Sets, state: AntidoteState
    ) -> AntidoteState:
        """Statistics of the calibration sets."""
        harmful = mean_squares(loss, params, sets["harmful"])
        return AntidoteState(
            harmful, mean_squares(loss, params, sets["alignment"]) if self.safety_mask else {}
        )

    def finish(self, params: Params, state: AntidoteState) -> Params:
        """``W ⊙ (1 − mask)``."""

        def mask(name: str, w: pruning.Matrix) -> pruning.Mask:
            harmful = pruning.top_of_rows(wanda(w, state.harmful[name]), self.dense_ratio)
            if not self.safety_mask:
                return harmful
            safe = pruning.top_of_rows(wanda(w, state.alignment[name]), self.dense_ratio)
            return harmful & ~safe

        return pruning.prune(params, mask)

    def report(self, params: Params, state: AntidoteState) -> dict[str, int]:
        """How much was cut."""
        return pruning.count_pruned(params, self.finish(params, state))


@jax.jit
def wanda(w: pruning.Matrix, a: Float[Array, "L in"]) -> pruning.Matrix:
    """``s_ij = |W_ij| √a_j``."""
    return jnp.abs(w) * jnp.sqrt(a)[..., None]
