"""Booster: alignment that takes the gain out of a harmful step (arXiv 2409.01586, ICLR 2025).

    min_w  L_align(w) + λ [ L_harm(w) − L_harm(w − α h/‖h‖) ]                              h = ∇ L_harm(w)

Stage: alignment. Passes per step: 3 (alignment at w, harmful at w and at w − α h/‖h‖); with Vaccine 4, two of them alignment.
Extra memory: two transient gradients; with Vaccine one ``[B, T, D]`` tensor a layer. Extra data: ``harmful``.

Differs from SFT in the term λ (h − h'), with h' the harmful gradient after one simulated step of the attack; the derivative of that
step by w is ignored, as in the public code. Booster + Vaccine, a switch of that code, takes the alignment gradient at perturbed
activations. The public code adds and takes away the step; here w is never touched, so nothing is lost to rounding.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from panacea_jax.defences.dropout import again
from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Batches,
    Defence,
    Facts,
    Gradient,
    LossFn,
    Metrics,
    Params,
    RandomKey,
    Stage,
    State,
    StreamSpec,
    check_not_negative,
)
from panacea_jax.defences.vaccine import perturbed_gradient
from panacea_jax.perturbation import to_sphere


def harmful_gain(
    loss_fn: LossFn, w: Params, batch: Any, alpha: float | int
) -> tuple[Params, Metrics]:
    """``h − h'``: the gradient of what one harmful step of length α gains; and what to log."""
    loss, h = jax.value_and_grad(loss_fn)(w, batch)
    sphere = to_sphere(alpha)
    step, _ = sphere.update(h, sphere.init(w))
    attacked = jax.tree.map(jnp.subtract, w, step)
    loss_attacked, h_attacked = jax.value_and_grad(loss_fn)(attacked, again(batch, 1))
    difference = jax.tree.map(jnp.subtract, h, h_attacked)
    return difference, {
        "harmful_loss": loss,
        "harmful_loss_attacked": loss_attacked,
        "norm_h": optax.tree.norm(h),
        "norm_difference": optax.tree.norm(difference),
    }


@dataclasses.dataclass(frozen=True)
class Booster(Defence):
    """Booster's gradient ``f + λ (h − h')``, f = ∇ L_align(w).

    Attributes:
        lam: λ, weight of the term. 5 is the repository's; the copy in Panacea's uses 100.
        alpha: α, L2 length of the simulated harmful step over all trainable tensors together. 0.1 is the repository's; the copy in
            Panacea's uses 0.01.
    """

    lam: float | int = 5.0
    alpha: float | int = 0.1

    stage: ClassVar[Stage] = "align"
    facts: ClassVar[Facts] = Facts(
        title="Booster",
        paper="arXiv 2409.01586",
        memory="two transient gradients",
        code="update rule reproduced; w is kept, not stepped and stepped back",
    )

    def __post_init__(self) -> None:
        check_not_negative(lam=self.lam, alpha=self.alpha)

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """Harmful records, at w and after the step."""
        return {"harmful": StreamSpec(passes=2)}

    def gradient(
        self, loss_fn: LossFn, params: Params, batches: Batches, state: State, key: RandomKey
    ) -> Gradient:
        """``f + λ (h − h')``."""
        gain, measured = harmful_gain(loss_fn, params, batches["harmful"], self.alpha)
        loss, f = jax.value_and_grad(loss_fn)(params, batches["user"])
        grads = jax.tree.map(lambda f, d: f + self.lam * d, f, gain)
        return grads, state, {"loss": loss, **measured}


@dataclasses.dataclass(frozen=True)
class BoosterVaccine(Defence):
    """Booster with Vaccine's gradient in the place of f.

    Attributes:
        lam: λ, as Booster's.
        alpha: α, as Booster's.
        rho: ρ, as Vaccine's; 5 in the repository's script for the pair.
    """

    lam: float | int = 5.0
    alpha: float | int = 0.1
    rho: float | int = 5.0

    stage: ClassVar[Stage] = "align"
    facts: ClassVar[Facts] = Facts(
        title="Booster + Vaccine",
        paper="arXiv 2409.01586",
        memory="two transient gradients, one B×T×D tensor a layer",
        code="a switch of Booster's code",
    )
    reads_every_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_not_negative(lam=self.lam, alpha=self.alpha, rho=self.rho)

    @property
    def passes(self) -> int:
        """Two on the same batch, as Vaccine."""
        return 2

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """Harmful records, as Booster's."""
        return {"harmful": StreamSpec(passes=2)}

    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: State, key: RandomKey
    ) -> Gradient:
        """``f + λ (h − h')``, f at perturbed activations."""
        gain, measured = harmful_gain(loss_fn, params, batches["harmful"], self.alpha)
        f, vaccine = perturbed_gradient(loss_fn, params, batches["user"], self.rho)
        grads = jax.tree.map(lambda f, d: f + self.lam * d, f, gain)
        return grads, state, {**vaccine, **measured}
