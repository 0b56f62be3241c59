"""Panacea: an adaptive perturbation that mends a model after harmful fine-tuning (arXiv 2501.18100, NeurIPS 2025).

    min_w  L_task(w) − λ · max_{‖ε‖≤ρ} [ L_harm(w + ε) − L_harm(w) ]                       deployed: w + ε

Stage: fine-tuning, plus one addition at the end. Passes per step: 3 (task, harmful at w, harmful at w + ε); 1 + 2/k where the harmful
ones are made at every k-th step only, and one more for each further ascent step. With ``final_epsilon="mean"`` one more for each ascent
step over the harmful set after the last step.
Extra memory: ε and its running mean, and two transient gradients, all of the size of the trainable tree. Extra data: ``harmful``.

Differs from SFT in the two harmful passes and in what is deployed. w alone is no defence: it can be more harmful than plain SFT, because
training makes room for ε to undo the harm. To first order the inner maximum is at ``ε = ρ h/‖h‖``; its derivative by w is ignored. The
published method stops there. K > 1 ``ascent_steps`` go on from it: ``ε ← proj_{‖ε‖≤ρ}(ε + ρ h(w + ε)/‖h(w + ε)‖)``, which stands still
where ε has the direction of the gradient at its own end, as at a maximum on the sphere.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from panacea_jax.defences.dropout import again
from panacea_jax.defences.loss import Loss, mean_gradient
from panacea_jax.defences.protocol import (
    Batches,
    Defence,
    Facts,
    Gradient,
    LossFn,
    Metrics,
    Params,
    RandomKey,
    Sets,
    Stage,
    StreamSpec,
    check_counts,
)
from panacea_jax.errors import InputError
from panacea_jax.perturbation import onto_ball, to_sphere

# The reference clamps the harmful loss at w + ε here; above it the pass has no gradient.
HARMFUL_LOSS_CLAMP = 5.0


class PanaceaState(NamedTuple):
    """What Panacea carries from step to step.

    Attributes:
        epsilon: ε of the last harmful batch, same tree as ``params``.
        epsilon_mean: running mean of ε over the steps that computed one.
        difference: ``h' − h``, kept only when it is reused (``every`` > 1); otherwise empty.
        measured: scalars of the last harmful passes, for the log.
        steps: number of steps taken.
    """

    epsilon: Params
    epsilon_mean: Params
    difference: Params
    measured: Metrics
    steps: Int[Array, ""]


class _HarmfulTerm(NamedTuple):
    """Outcome of the two harmful passes."""

    epsilon: Params
    difference: Params
    h: Params
    measured: Metrics


def _difference(a: Params, b: Params) -> Params:
    return jax.tree.map(jnp.subtract, a, b)


def _cosine(a: Params, b: Params) -> Float[Array, ""]:
    """Cosine between two trees; 0 when either is zero."""
    scale = optax.tree.norm(a) * optax.tree.norm(b)
    return jnp.where(scale > 0, optax.tree.vdot(a, b) / jnp.where(scale > 0, scale, 1.0), 0.0)


@dataclasses.dataclass(frozen=True)
class Panacea(Defence):
    """Panacea's gradient ``g − λ (h' − h)``.

    Attributes:
        rho: ρ, L2 radius of ε over all trainable tensors together; a tuple gives one radius a layer.
        lam: λ, weight of the training term.
        ascent_steps: K, projected ascent steps that find ε; 1 is the paper's closed form.
        every: refresh ε and ``h' − h`` at every k-th step and reuse them in between.
        clamp: "reference" stops the gradient of the perturbed loss above 5, which leaves ``g + λ h``; "none" never does.
        final_epsilon: "last" deploys the ε of the last step (one batch, as the reference); "mean" recomputes it after training from
            the gradient over the whole harmful set.
    """

    rho: float | int | tuple[float, ...] | str = 1.0
    lam: float | int = 1e-3
    ascent_steps: int = 1
    every: int = 1
    clamp: Literal["reference", "none"] = "reference"
    final_epsilon: Literal["last", "mean"] = "last"

    stage: ClassVar[Stage] = "finetune"
    facts: ClassVar[Facts] = Facts(
        title="Panacea",
        paper="arXiv 2501.18100",
        memory="ε, its running mean, two transient gradients",
        code="update rule, clamp and ε of the last step reproduced; ε has a buffer of its own",
    )

    def __post_init__(self) -> None:
        radii = self.rho if isinstance(self.rho, tuple) else (self.rho,)
        if not all(0 <= r < float("inf") for r in radii):
            raise InputError(
                f"config.defence.rho = {self.rho}: a radius is a finite number, 0 or more"
            )
        if not 0 <= self.lam < float("inf"):
            raise InputError(f"config.defence.lam = {self.lam}: λ is a finite number, 0 or more")
        check_counts(ascent_steps=self.ascent_steps)
        if self.every < 1:
            raise InputError(f"config.defence.every = {self.every}: refresh every 1 or more steps")
        if self.clamp not in ("reference", "none"):
            raise InputError(f"config.defence.clamp = {self.clamp!r}: 'reference' or 'none'")
        if self.final_epsilon not in ("last", "mean"):
            raise InputError(
                f"config.defence.final_epsilon = {self.final_epsilon!r}: 'last' or 'mean'"
            )

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """Harmful passes, averaged over the steps that share them; and those over the whole set that the mean ε takes."""
        whole = float(self.ascent_steps) if self.final_epsilon == "mean" else 0.0
        passes = (1 + self.ascent_steps) / self.every
        return {"harmful": StreamSpec(passes=passes, whole_passes=whole)}

    def init(self, params: Params) -> PanaceaState:
        """ε = 0."""
        zeros = jax.tree.map(jnp.zeros_like, params)
        names = ("harmful_loss", "harmful_loss_perturbed", "norm_h", "norm_difference", "clamped",
                 "epsilon_cosine")  # fmt: skip
        measured = {name: jnp.zeros((), jax.tree.leaves(params)[0].dtype) for name in names}
        # Separate buffers: the state is donated, and one buffer cannot be donated twice.
        copy = jax.tree.map(jnp.zeros_like, params)
        held = jax.tree.map(jnp.zeros_like, params) if self.every > 1 else ()
        return PanaceaState(zeros, copy, held, measured, jnp.zeros((), jnp.int32))

    def _ascend(
        self, w: Params, h: Params, harmful_gradient: Callable[[Params, int], Params]
    ) -> Params:
        """ε: ``ρ h / (‖h‖ + 1e-7)``, and from there ``ascent_steps`` − 1 projected steps.

        Args:
            w: where ε is added.
            h: the harmful gradient there.
            harmful_gradient: the same elsewhere, in the pass of that number.
        """
        rho = jnp.asarray(self.rho) if isinstance(self.rho, tuple) else self.rho
        sphere = to_sphere(rho)
        epsilon, _ = sphere.update(h, sphere.init(w))
        ascent = optax.chain(to_sphere(rho), onto_ball(rho))
        state = ascent.init(epsilon)
        for number in range(1, self.ascent_steps):
            h = harmful_gradient(jax.tree.map(jnp.add, w, epsilon), number)
            update, state = ascent.update(h, state, epsilon)
            epsilon = optax.apply_updates(epsilon, update)
        return epsilon

    def _harmful_term(
        self, loss_fn: LossFn, w: Params, batch: Any, previous: Params
    ) -> _HarmfulTerm:
        """``h`` at w, ``ε`` from it, ``h'`` at w + ε, and ``h' − h``."""

        def perturbed_loss(w: Params) -> tuple[Float[Array, ""], Float[Array, ""]]:
            loss = loss_fn(w, again(batch, self.ascent_steps))
            if self.clamp == "none":
                return loss, loss
            # At exactly 5 the gradient still flows, as in torch.clamp.
            return jnp.where(loss <= HARMFUL_LOSS_CLAMP, loss, HARMFUL_LOSS_CLAMP), loss

        loss, h = jax.value_and_grad(loss_fn)(w, batch)
        epsilon = self._ascend(w, h, lambda at, n: jax.grad(loss_fn)(at, again(batch, n)))
        (_, loss_perturbed), h_perturbed = jax.value_and_grad(perturbed_loss, has_aux=True)(
            jax.tree.map(jnp.add, w, epsilon)
        )
        difference = _difference(h_perturbed, h)
        clamped = (loss_perturbed > HARMFUL_LOSS_CLAMP) & (self.clamp == "reference")
        measured = {
            "harmful_loss": loss,
            "harmful_loss_perturbed": loss_perturbed,
            "norm_h": optax.tree.norm(h),
            "norm_difference": optax.tree.norm(difference),
            "clamped": clamped.astype(loss.dtype),
            "epsilon_cosine": _cosine(epsilon, previous),
        }
        return _HarmfulTerm(epsilon, difference, h, measured)

    def gradient(
        self, loss_fn: LossFn, params: Params, batches: Batches, state: PanaceaState, key: RandomKey
    ) -> Gradient:
        """``g − λ (h' − h)`` with ε recomputed from this step's harmful batch."""
        loss, g = jax.value_and_grad(loss_fn)(params, batches["user"])

        def fresh(state: PanaceaState) -> tuple[PanaceaState, Params, Metrics]:
            term = self._harmful_term(loss_fn, params, batches["harmful"], state.epsilon)
            refreshes = state.steps // self.every + 1
            mean = jax.tree.map(
                lambda m, e: m + (e - m) / refreshes, state.epsilon_mean, term.epsilon
            )
            dot = optax.tree.vdot(g, term.h)
            h2 = jnp.square(term.measured["norm_h"])
            # g ≈ (1 − p) g_clean + p h for a user set with a share p of harmful tokens, so <g,h>/<h,h> ≈ p while g_clean ⟂ h.
            share = jnp.where(h2 > 0, dot / jnp.where(h2 > 0, h2, 1.0), 0.0)
            measured = {"cos_gh": _cosine(g, term.h), "poison_estimate": share}
            held = term.difference if self.every > 1 else ()
            new = PanaceaState(term.epsilon, mean, held, term.measured, state.steps + 1)
            return new, term.difference, measured

        def reuse(state: PanaceaState) -> tuple[PanaceaState, Params, Metrics]:
            nothing = jnp.full_like(loss, jnp.nan)
            measured = {"cos_gh": nothing, "poison_estimate": nothing}
            return state._replace(steps=state.steps + 1), state.difference, measured

        if self.every == 1:
            state, difference, measured = fresh(state)
        else:
            state, difference, measured = jax.lax.cond(
                state.steps % self.every == 0, fresh, reuse, state
            )
        grads = jax.tree.map(lambda g, d: g - self.lam * d, g, difference)

        norm_g = optax.tree.norm(g)
        ratio = self.lam * state.measured["norm_difference"] / jnp.maximum(norm_g, 1e-12)
        metrics = {"loss": loss, "norm_g": norm_g, "norm_epsilon": optax.tree.norm(state.epsilon),
                   "term_ratio": ratio, **state.measured, **measured}  # fmt: skip
        return grads, state, metrics

    def last_pass(
        self, loss: Loss, params: Params, sets: Sets, state: PanaceaState
    ) -> PanaceaState:
        """With ``final_epsilon="mean"``: ε from the gradient over the whole harmful set at the final w."""
        if self.final_epsilon == "last":
            return state

        def whole_gradient(w: Params, _: int = 0) -> Params:
            return mean_gradient(loss, w, sets["harmful"])

        h = whole_gradient(params)
        return state._replace(epsilon=self._ascend(params, h, whole_gradient))

    def finish(self, params: Params, state: PanaceaState) -> Params:
        """``w + ε``."""
        return jax.tree.map(jnp.add, params, state.epsilon)

    def epsilon(self, state: PanaceaState) -> Params:
        """ε."""
        return state.epsilon

    def epsilon_mean(self, state: PanaceaState) -> Params:
        """Its running mean."""
        return state.epsilon_mean
