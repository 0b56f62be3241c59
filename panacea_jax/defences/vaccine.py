"""Vaccine: alignment that withstands drifting activations (arXiv 2402.01109, NeurIPS 2024).

    min_w  max_{‖e‖≤ρ} L_align(w; o_l + e_l)          e_l = ρ ∇_{o_l} L / (N + 1e-7),  N² = Σ_l ‖∇_{o_l} L‖²

Stage: alignment. Passes per step: 2 on the same batch. Extra memory: one ``[B, T, D]`` tensor a layer. Extra data: none.

o_l is the output of layer l's attention module, before the residual; ρ is one budget for all layers, tokens and records together.
Differs from SFT in the gradient, which is taken at the perturbed activations. The paper speaks of the hidden embeddings of every
layer; the public code, followed here, perturbs attention outputs only.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from panacea_jax.defences.dropout import again
from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Batches,
    Defence,
    Facts,
    Gradient,
    Metrics,
    Params,
    RandomKey,
    Stage,
    State,
    check_not_negative,
)
from panacea_jax.models.bound import SomeOffsets
from panacea_jax.models.precision import wide
from panacea_jax.perturbation import to_sphere


def no_offsets(
    loss: Loss, batch: Any, layers: Int[Array, "S"] | None = None
) -> Float[Array, "S B T D"]:
    """Zero offsets for a batch, in the compute dtype, of all layers or of some."""
    config = loss.model.config
    count = config.num_layers if layers is None else layers.size
    return jnp.zeros((count, *batch.tokens.shape, config.hidden_size), loss.model.dtype)


def perturbed_gradient(
    loss: Loss,
    params: Params,
    batch: Any,
    rho: float | int,
    layers: Int[Array, "S"] | None = None,
) -> tuple[Params, Metrics]:
    """The gradient by ``params`` at activations moved ρ up the loss, and what to log; with ``layers`` only those are moved."""

    def at(offsets: Float[Array, "S B T D"], params: Params, batch: Any) -> Float[Array, ""]:
        return loss(params, batch, offsets if layers is None else SomeOffsets(offsets, layers))

    value, at_outputs = jax.value_and_grad(at)(no_offsets(loss, batch, layers), params, batch)
    # Norms in float32: a sum over B·T·D·L squares is more than bfloat16 can count.
    up = at_outputs.astype(wide(at_outputs.dtype))
    sphere = to_sphere(rho)
    offsets, _ = sphere.update(up, sphere.init(up))
    second = jax.value_and_grad(at, argnums=1)
    moved, grads = second(offsets.astype(at_outputs.dtype), params, again(batch, 1))
    metrics = {"loss": value, "loss_perturbed": moved, "norm_outputs": optax.tree.norm(up)}
    return grads, metrics


@dataclasses.dataclass(frozen=True)
class Vaccine(Defence):
    """Vaccine's second gradient.

    Attributes:
        rho: ρ, L2 norm of the perturbation over all attention outputs together. 2 is the repository's; copies of it in other
            repositories use 3, 5 and 20.
    """

    rho: float | int = 2.0

    stage: ClassVar[Stage] = "align"
    facts: ClassVar[Facts] = Facts(
        title="Vaccine",
        paper="arXiv 2402.01109",
        memory="one B×T×D tensor a layer",
        code="attention outputs only, as its code; without LoRA dropout both passes see one function",
    )
    reads_every_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_not_negative(rho=self.rho)

    @property
    def passes(self) -> int:
        """Two on the same batch."""
        return 2

    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: State, key: RandomKey
    ) -> Gradient:
        """The gradient at the perturbed activations; the first pass only finds the perturbation."""
        grads, metrics = perturbed_gradient(loss_fn, params, batches["user"], self.rho)
        return grads, state, metrics
