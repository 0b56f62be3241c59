"""EWC: fine-tuning that spares the weights which alignment needs (elastic weight consolidation, arXiv 1612.00796).

    min_w  L_task(w) + λ Σ F ⊙ (w − w₀)²             F = Σ_batches (∇ L_align(w₀))², over the alignment set once

Stage: fine-tuning. Passes per step: 1, and 1 over the alignment set before the first step. Extra memory: F and w₀, of the size of the
trainable tree. Extra data: ``alignment``, before the first step only.

Differs from SFT in the penalty. As in the public code F is a sum of squared *batch* gradients, so it grows with the set and depends on
the batch size, and there is no ½. Not reproduced: there the gradient of the last of these batches stays and enters the first step, F is
taken under dropout, and two copies of the code take it on harmful data, which would protect the weights that harm needs. A matrix that
has no gradient at w₀, as every A of a fresh adapter with B = 0, is left free.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from panacea_jax.defences.protocol import (
    Batches,
    Defence,
    Facts,
    Gradient,
    LossFn,
    Params,
    RandomKey,
    Sets,
    Stage,
    StreamSpec,
    check_not_negative,
)
from panacea_jax.perturbation import inner


class EwcState(NamedTuple):
    """What EWC compares with.

    Attributes:
        start: w₀, the trainable tree at the start.
        fisher: F, same tree; not negative.
    """

    start: Params
    fisher: Params


@functools.partial(jax.jit, donate_argnums=0)
def _add_square(fisher: Params, loss: LossFn, params: Params, batch: Any) -> Params:
    """``F + (∇ L)²`` of one batch."""
    g = jax.grad(loss)(params, batch)
    return jax.tree.map(lambda f, g: f + jnp.square(g), fisher, g)


@dataclasses.dataclass(frozen=True)
class Ewc(Defence):
    """The gradient ``∇ L_task(w) + 2 λ F ⊙ (w − w₀)``.

    Attributes:
        lam: λ, weight of the penalty; so large because F is a square of small gradients.
    """

    lam: float | int = 1e9

    stage: ClassVar[Stage] = "finetune"
    facts: ClassVar[Facts] = Facts(
        title="EWC",
        paper="arXiv 1612.00796",
        memory="starting parameters, Fisher diagonal",
        code="sum of squared batch gradients reproduced; no gradient is left over from it, safe data only",
    )

    def __post_init__(self) -> None:
        check_not_negative(lam=self.lam)

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """F takes a gradient of every alignment record."""
        return {"alignment": StreamSpec(whole_passes=1.0)}

    def init(self, params: Params) -> EwcState:
        """w₀ = w, F = 0."""
        return EwcState(jax.tree.map(jnp.copy, params), jax.tree.map(jnp.zeros_like, params))

    def first_pass(self, loss: LossFn, params: Params, sets: Sets, state: EwcState) -> EwcState:
        """F over the alignment set."""
        fisher = state.fisher
        for batch in sets["alignment"]:
            fisher = _add_square(fisher, loss, params, batch)
        return state._replace(fisher=fisher)

    def gradient(
        self, loss_fn: LossFn, params: Params, batches: Batches, state: EwcState, key: RandomKey
    ) -> Gradient:
        """``∇ L_task(w) + 2 λ F ⊙ (w − w₀)``."""
        loss, g = jax.value_and_grad(loss_fn)(params, batches["user"])
        drift = jax.tree.map(jnp.subtract, params, state.start)
        pull = jax.tree.map(lambda f, d: self.lam * f * d, state.fisher, drift)
        grads = jax.tree.map(lambda g, p: g + 2 * p, g, pull)
        return grads, state, {"loss": loss, "penalty": inner(pull, drift)}
