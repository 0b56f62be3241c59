"""Unlearning of ε: an attack on finished weights, by somebody who knows of Panacea and subtracts an ε̂ of his own.

    ε̂ = ρ h/‖h‖,  h = ∇L_attack(w) over the attacker's harmful records                                       left: w − ε̂

Stage: post-fine-tuning, one shot. Passes: one over the attack set. Extra memory: ε̂. Extra data: ``attack``.

No defence: it stands among them to be measured in the same way. No paper's method; it is Panacea's closed form (arXiv 2501.18100) with the
other sign, at the weights that were deployed, w + ε, since the attacker has no others. The attack by noise is ``random_perturbation``.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from panacea_jax.defences.loss import Loss, mean_gradient
from panacea_jax.defences.protocol import (
    Facts,
    Method,
    Params,
    Sets,
    Stage,
    StreamSpec,
    check_not_negative,
)
from panacea_jax.perturbation import to_sphere


class UnlearnState(NamedTuple):
    """ε̂, same tree as ``params``."""

    subtracted: Params


@dataclasses.dataclass(frozen=True)
class Unlearn(Method):
    """Subtract the ε̂ that raises the loss of the attacker's records most.

    Attributes:
        rho: ρ, L2 norm of ε̂ over all trainable tensors together.
    """

    rho: float | int = 1.0

    stage: ClassVar[Stage] = "heal"
    facts: ClassVar[Facts] = Facts(
        title="unlearning (an attack)",
        paper="arXiv 2501.18100, its ε with the other sign",
        memory="ε̂",
        code="no code to follow: Panacea's closed form, subtracted",
    )

    def __post_init__(self) -> None:
        check_not_negative(rho=self.rho)

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """The attacker's records, each once."""
        return {"attack": StreamSpec(whole_passes=1.0)}

    def init(self, params: Params) -> UnlearnState:
        """ε̂ = 0."""
        return UnlearnState(jax.tree.map(jnp.zeros_like, params))

    def first_pass(
        self, loss: Loss, params: Params, sets: Sets, state: UnlearnState
    ) -> UnlearnState:
        """Find ε̂."""
        sphere = to_sphere(self.rho)
        h = mean_gradient(loss, params, sets["attack"])
        return UnlearnState(sphere.update(h, sphere.init(params))[0])

    def finish(self, params: Params, state: UnlearnState) -> Params:
        """``w − ε̂``."""
        return jax.tree.map(jnp.subtract, params, state.subtracted)
