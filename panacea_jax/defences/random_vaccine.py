"""Random Vaccine: noise on the activations in alignment, the control of Vaccine (a baseline in its repository, arXiv 2402.01109).

    min_w  E_z L_align(w; o_l + √ρ z_l),  z ~ N(0, 1)

Stage: alignment. Passes per step: 1. Extra memory: the noise, one ``[B, T, D]`` tensor a layer. Extra data: none.

o_l is the output of layer l's attention module, before the residual. ρ is a variance here, as in the public code, not a norm.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Batches,
    Defence,
    Facts,
    Gradient,
    Params,
    RandomKey,
    Stage,
    State,
    check_not_negative,
)
from panacea_jax.defences.vaccine import no_offsets


@dataclasses.dataclass(frozen=True)
class RandomVaccine(Defence):
    """The gradient at noisy activations.

    Attributes:
        rho: ρ, variance of the noise on each entry of each attention output.
    """

    rho: float | int = 2.0

    stage: ClassVar[Stage] = "align"
    facts: ClassVar[Facts] = Facts(
        title="random Vaccine",
        paper="arXiv 2402.01109",
        memory="the noise, one B×T×D tensor a layer",
        code="ρ is the variance, as its code",
    )
    reads_every_layer: ClassVar[bool] = True
    unpackable: ClassVar[str] = (
        "draws noise for each place of a batch, so packed records get other noise"
    )

    def __post_init__(self) -> None:
        check_not_negative(rho=self.rho)

    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: State, key: RandomKey
    ) -> Gradient:
        """The gradient with fresh noise at each step."""
        still = no_offsets(loss_fn, batches["user"])
        noise = jnp.sqrt(jnp.asarray(self.rho, still.dtype)) * jax.random.normal(
            key, still.shape, still.dtype
        )
        value, grads = jax.value_and_grad(loss_fn)(params, batches["user"], noise)
        return grads, state, {"loss": value}
