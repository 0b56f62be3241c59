"""SafeGrad: the user's gradient without the part that undoes alignment (arXiv 2508.07172).

    g_u = ∇ L_task(w)        g_a = ∇ 1/T Σ_t D( p_t(w₀) ‖ p_t(w) )        t: the T positions of L_align
    g_u ← g_u − ⟨g_u, g_a⟩ / ‖g_a‖² · g_a      where ⟨g_u, g_a⟩ < 0
    g = g_u + ρ g_a

Stage: fine-tuning. Passes per step: 2½, 1 on the user's batch and 1½ on alignment records (one forward of the teacher, w₀; 1⅓ where all
parameters are trained). Extra memory: w₀, a second gradient, and two ``[B, T, V]`` of logits. Extra data: ``alignment``.

Differs from SFT in the direction. The teacher is the same base with the starting adapter: no second base in LoRA mode. At w = w₀, as at
the start, g_a is 0 but for rounding: where ‖g_a‖ is below a share of ‖g_u‖ that rounding explains, g is g_u. Nothing is projected then,
and nothing added: of entries without a gradient of the task's, such as embeddings of other words, Adam would make whole steps of rounding.

Read from the abstract and two public re-implementations that quote the equations. Both have the inner products over all tensors together,
so one conflict or none a step, and g_a added with the weight ρ = 1; so has this. Open is over which positions of an alignment record the
divergence is taken. Here: those that predict its response, and their mean. The authors' code is said to sum over prompts and padding too
and to divide by the number of response tokens, so that ρ would depend on how a batch is padded, and to project where ‖g_a‖² > 1e-9.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from panacea_jax.data.batches import Batch
from panacea_jax.defences.dropout import without_dropout
from panacea_jax.defences.kl import divergence
from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Anchor,
    Anchored,
    Batches,
    Facts,
    Gradient,
    Params,
    RandomKey,
    Stage,
    StreamSpec,
    check_not_negative,
)
from panacea_jax.perturbation import inner

# ‖g_a‖ / ‖g_u‖ up to which g_a is rounding and has no direction.
ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class SafeGrad(Anchored):
    """The task's gradient, off that of the divergence where they conflict, and ρ times the latter.

    Attributes:
        rho: ρ, weight of the divergence's gradient; the projection acts whatever it is.
    """

    rho: float | int = 1.0

    stage: ClassVar[Stage] = "finetune"
    facts: ClassVar[Facts] = Facts(
        title="SafeGrad",
        paper="arXiv 2508.07172",
        memory="starting parameters, a second gradient, two B×T×V logits",
        code="one projection over all tensors; divergence over response positions only, guard by a share of the task's gradient",
    )

    def __post_init__(self) -> None:
        check_not_negative(rho=self.rho)

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """Alignment records, with one more forward pass, of the teacher."""
        return {"alignment": StreamSpec(passes=3 / 2)}

    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: Anchor, key: RandomKey
    ) -> Gradient:
        """``g_u + ρ g_a``, g_u off g_a where they conflict."""
        loss, g = jax.value_and_grad(loss_fn)(params, batches["user"])

        safe = batches["alignment"]
        counts = safe.loss_mask[:, 1:]

        def logits(w: Params, batch: Batch) -> Float[Array, "B _ V"]:
            # Position t predicts token t + 1; the last one predicts nothing.
            return loss_fn.bind(w).logits(loss_fn.forward(w, batch).hidden[:, :-1])

        teacher = logits(state.start, without_dropout(safe))

        def apart(w: Params) -> Float[Array, ""]:
            return divergence(logits(w, safe), teacher, counts).sum() / jnp.maximum(counts.sum(), 1)

        kl, a = jax.value_and_grad(apart)(params)

        along, of_g, of_a = inner(g, a), inner(g, g), inner(a, a)
        told = of_a > ROUNDING**2 * of_g
        conflict = told & (along < 0)
        taken = jnp.where(conflict, along / jnp.where(conflict, of_a, 1.0), 0.0)
        factor = jnp.where(told, self.rho - taken, 0.0)
        grads = jax.tree.map(lambda g, a: g + factor.astype(a.dtype) * a, g, a)

        lengths = jnp.sqrt(of_g) * jnp.sqrt(of_a)
        cosine = along / jnp.where(lengths > 0, lengths, 1.0)
        metrics = {"loss": loss, "kl": kl, "cosine": cosine, "conflict": conflict.astype(loss.dtype)}
        return grads, state, metrics
