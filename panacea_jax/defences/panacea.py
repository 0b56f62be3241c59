"""Panacea: an adaptive perturbation that mends a model after harmful fine-tuning (arXiv 2501.18100, NeurIPS 2025).

    min_w  L_task(w) − λ · max_{‖ε‖≤ρ} [ L_harm(w + ε) − L_harm(w) ]                       deployed: w + ε

Stage: fine-tuning, plus one addition at the end. Passes per step: 3 (task, harmful at w, harmful at w + ε); 1 + 2/k where the harmful
ones are made at every k-th step only, none before ``start``, and one more for each further ascent step. With ``final_epsilon="mean"`` one
more for each ascent step over the harmful set after the last step.
Extra memory: ε and its running mean, and two transient gradients, all of the size of the trainable tree. Extra data: ``harmful``.

Differs from SFT in the two harmful passes and in what is deployed. w alone is no defence: it can be more harmful than plain SFT, because
training makes room for ε to undo the harm. To first order the inner maximum is at ``ε = ρ h/‖h‖``; its derivative by w is ignored. The
published method stops there. K > 1 ``ascent_steps`` go on from it: ``ε ← proj_{‖ε‖≤ρ}(ε + ρ h(w + ε)/‖h(w + ε)‖)``, which stands still
where ε has the direction of the gradient at its own end, as at a maximum on the sphere.

Ours, off by default (``panacea_options.py``): λ and ρ by what is measured (``steering.py``, ``rho="auto"``), a radius for each layer
(``perturbation/radii.py``), cheaper schedules, and two variants. ``trusted`` rows are learnt where the model is deployed, which adds
``ϑ ∇L_trusted(w + ε)``; and ``off``: ε goes along the part of h that is orthogonal to other gradients, so that to first order their losses
do not feel it (with a radius for each layer, orthogonal in each).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from panacea_jax.defences.dropout import again
from panacea_jax.defences.loss import Loss, mean_gradient
from panacea_jax.defences.panacea_options import PanaceaOptions
from panacea_jax.defences.protocol import (
    Batches,
    Facts,
    Gradient,
    LossFn,
    Metrics,
    Params,
    RandomKey,
    Sets,
    Stage,
)
from panacea_jax.errors import InputError
from panacea_jax.parallel import processes
from panacea_jax.perturbation import inner, norms, off_span, onto_ball, stacked_layers, to_sphere

# The reference clamps the harmful loss at w + ε here; above it the pass has no gradient.
HARMFUL_LOSS_CLAMP = 5.0


class PanaceaState(NamedTuple):
    """What Panacea carries from step to step.

    Attributes:
        epsilon: ε of the last harmful batch that has a gradient, same tree as ``params``.
        epsilon_mean: running mean of ε over the steps that computed one.
        difference: ``h' − h``, kept only when it is reused (``every`` > 1); otherwise empty.
        measured: scalars of the last harmful passes, for the log.
        steps: number of steps taken.
        layers: radii of the layers for ρ = 1, ``[L]``; empty without ``rho_per_layer``.
        steered: a :class:`~panacea_jax.defences.steering.Steered`; empty where λ and ρ stand still.
    """

    epsilon: Params
    epsilon_mean: Params
    difference: Params
    measured: Metrics
    steps: Int[Array, ""]
    layers: Any = ()
    steered: Any = ()


class _HarmfulTerm(NamedTuple):
    """Outcome of the two harmful passes."""

    epsilon: Params
    difference: Params
    h: Params
    measured: Metrics


def _difference(a: Params, b: Params) -> Params:
    return jax.tree.map(jnp.subtract, a, b)


def _off(rho: Any) -> Callable[[Params, list[Params]], Params]:
    """How h is taken off other gradients. With a radius for each layer it is in each by itself: layers are scaled differently afterwards,
    and what is orthogonal over all of them together would no longer be."""
    return jax.vmap(off_span) if jnp.ndim(rho) == 1 else off_span


def _cosine(a: Params, b: Params) -> Float[Array, ""]:
    """Cosine between two trees; 0 when either is zero."""
    scale = optax.tree.norm(a) * optax.tree.norm(b)
    return jnp.where(scale > 0, inner(a, b) / jnp.where(scale > 0, scale, 1.0), 0.0)


@dataclasses.dataclass(frozen=True)
class Panacea(PanaceaOptions):
    """Panacea's gradient ``g − λ (h' − h)``; its hyper-parameters are in :class:`PanaceaOptions`."""

    stage: ClassVar[Stage] = "finetune"
    facts: ClassVar[Facts] = Facts(
        title="Panacea",
        paper="arXiv 2501.18100",
        memory="ε, its running mean, two transient gradients",
        code="update rule, clamp and ε of the last step reproduced; ε has a buffer of its own",
    )

    def init(self, params: Params) -> PanaceaState:
        """ε = 0.

        Raises:
            InputError: radii by layer that do not fit the layers of what is trained.
        """
        zeros = jax.tree.map(jnp.zeros_like, params)
        dtype = jax.tree.leaves(params)[0].dtype
        names = ("harmful_loss", "harmful_loss_perturbed", "norm_h", "norm_difference", "clamped",
                 "epsilon_cosine")  # fmt: skip
        # Unknown until the first harmful passes, which only a late start puts off.
        measured = {name: jnp.full((), jnp.nan if self.start else 0, dtype) for name in names}
        # Separate buffers: the state is donated, and one buffer cannot be donated twice.
        copy = jax.tree.map(jnp.zeros_like, params)
        held = jax.tree.map(jnp.zeros_like, params) if self._holds else ()
        if isinstance(self.rho, tuple) and len(self.rho) != (count := stacked_layers(params, "config.defence.rho")):
            raise InputError(f"config.defence.rho = {self.rho}: {len(self.rho)} radii for {count} layers")
        layers: Any = ()
        if self._layers:
            depth = stacked_layers(params)
            # As if all coefficients were equal, until the first pass has looked at them.
            layers = jnp.asarray(self._layers.unit(depth, np.ones(depth)), dtype)
        steered = self._steering.init(params) if self._steering else ()
        return PanaceaState(zeros, copy, held, measured, jnp.zeros((), jnp.int32), layers, steered)

    def first_pass(self, loss: Loss, params: Params, sets: Sets, state: PanaceaState) -> PanaceaState:
        """L_harm(w₀), where ρ has a ceiling; radii that go by the layers' harmful gradient."""
        if self._steering:
            seen = self._steering.look(state.steered, loss, params, sets["harmful"])
            state = state._replace(steered=seen)
        if self._layers.probes:
            found = norms(mean_gradient(loss, params, sets["harmful"]), per_layer=True)
            unit = self._layers.unit(len(found), processes.to_host(found))
            state = state._replace(layers=jnp.asarray(unit, state.layers.dtype))
        return state

    def _radius(self, w: Params, state: PanaceaState) -> Any:
        """ρ: one number, or one for each layer."""
        rho: Any = jnp.asarray(self.rho) if isinstance(self.rho, tuple) else self.rho
        if self._steering:
            rho = self._steering.radius(state.steered, rho, w)
        return rho * state.layers if self._layers else rho

    def _ascend(
        self, w: Params, h: Params, harmful_gradient: Callable[[Params, int], Params], rho: Any
    ) -> Params:
        """ε: ``ρ h / (‖h‖ + 1e-7)``, and from there ``ascent_steps`` − 1 projected steps.

        Args:
            w: where ε is added.
            h: the harmful gradient there.
            harmful_gradient: the same elsewhere, in the pass of that number.
            rho: ρ, see ``_radius``.
        """
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
        self, loss_fn: LossFn, w: Params, batches: Batches, g: Params, state: PanaceaState
    ) -> _HarmfulTerm:
        """``h`` at w, ``ε`` from it, ``h'`` at w + ε, and ``h' − h``."""
        batch, rho = batches["harmful"], self._radius(w, state)
        off = _off(rho)
        spared = [g if name == "user" else jax.grad(loss_fn)(w, batches[name]) for name in self.off]

        def perturbed_loss(w: Params) -> tuple[Float[Array, ""], Float[Array, ""]]:
            loss = loss_fn(w, again(batch, self.ascent_steps))
            if self.clamp == "none":
                return loss, loss
            # At exactly 5 the gradient still flows, as in torch.clamp.
            return jnp.where(loss <= HARMFUL_LOSS_CLAMP, loss, HARMFUL_LOSS_CLAMP), loss

        loss, h = jax.value_and_grad(loss_fn)(w, batch)
        epsilon = self._ascend(
            w,
            off(h, spared),
            lambda at, n: off(jax.grad(loss_fn)(at, again(batch, n)), spared),
            rho,
        )
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
            "epsilon_cosine": _cosine(epsilon, state.epsilon),
        }
        return _HarmfulTerm(epsilon, difference, h, measured)

    def gradient(
        self, loss_fn: LossFn, params: Params, batches: Batches, state: PanaceaState, key: RandomKey
    ) -> Gradient:
        """``g − λ (h' − h)`` with ε recomputed from this step's harmful batch."""
        loss, g = jax.value_and_grad(loss_fn)(params, batches["user"])
        since = state.steps - self._first  # steps since the defence began
        begun, refreshed = since >= 0, (since >= 0) & (since % self.every == 0)

        def fresh(state: PanaceaState) -> tuple[PanaceaState, Params, Metrics]:
            term = self._harmful_term(loss_fn, params, batches, g, state)
            refreshes = since // self.every + 1
            mean = jax.tree.map(
                lambda m, e: m + (e - m) / refreshes, state.epsilon_mean, term.epsilon
            )
            dot = inner(g, term.h)
            h2 = jnp.square(term.measured["norm_h"])
            # g ≈ (1 − p) g_clean + p h for a user set with a share p of harmful tokens, so <g,h>/<h,h> ≈ p while g_clean ⟂ h.
            share = jnp.where(h2 > 0, dot / jnp.where(h2 > 0, h2, 1.0), 0.0)
            measured = {"cos_gh": _cosine(g, term.h), "poison_estimate": share}
            held = term.difference if self._holds else ()
            # Records without loss show no direction; ε stays that of the last ones that do, or a last batch of them would deploy w alone.
            told = term.measured["norm_h"] > 0
            epsilon = jax.tree.map(lambda e, before: jnp.where(told, e, before), term.epsilon, state.epsilon)
            new = state._replace(
                epsilon=epsilon, epsilon_mean=mean, difference=held, measured=term.measured
            )
            if self._steering:
                losses = (term.measured[f"harmful_loss{at}"] for at in ("", "_perturbed"))
                seen = self._steering.measure(state.steered, dot, term.h, term.epsilon, *losses)
                new = new._replace(steered=seen)
            return new, term.difference, measured

        def old(state: PanaceaState) -> tuple[PanaceaState, Params, Metrics]:
            nothing = jnp.full_like(loss, jnp.nan)
            measured = {"cos_gh": nothing, "poison_estimate": nothing}
            held = state.difference if self._holds else jax.tree.map(jnp.zeros_like, g)
            return state, held, measured

        if self.every == 1 and not self.start:
            state, difference, measured = fresh(state)
        else:
            state, difference, measured = jax.lax.cond(refreshed, fresh, old, state)
        state = state._replace(steps=state.steps + 1)

        norm_g, size = optax.tree.norm(g), state.measured["norm_difference"]
        steering = self._steering
        lam: Any = steering.strength(state.steered, norm_g, size) if steering else steering.lam
        grads = jax.tree.map(lambda g, d: g - lam * d, g, difference)

        ratio = lam * size / jnp.maximum(norm_g, 1e-12)
        applied = begun if self._holds else refreshed
        metrics = {"loss": loss, "norm_g": norm_g, "norm_epsilon": optax.tree.norm(state.epsilon),
                   "term_ratio": jnp.where(applied, ratio, jnp.nan), **state.measured, **measured}  # fmt: skip
        if steering:
            metrics |= steering.metrics(state.steered, lam)
        if self.trusted:
            at = jax.tree.map(jnp.add, params, state.epsilon)
            metrics["trusted_loss"], pull = self._trusted(loss_fn, at, batches, begun)
            grads = jax.tree.map(lambda g, t: g + self.trust * t, grads, pull)
        return grads, state, metrics

    def _trusted(
        self, loss_fn: LossFn, at: Params, batches: Batches, begun: Bool[Array, ""]
    ) -> tuple[Float[Array, ""], Params]:
        """Loss of the trusted rows at w + ε and its gradient; 0 before the defence has begun."""

        def loss(at: Params) -> Float[Array, ""]:
            # A batch that ``off`` has been over already is seen for the second time.
            parts = [loss_fn(at, again(batches[n], 1) if n in self.off else batches[n]) for n in self.trusted]
            return sum(parts[1:], parts[0])

        def nothing(at: Params) -> tuple[Float[Array, ""], Params]:
            return jnp.zeros((), jax.tree.leaves(at)[0].dtype), jax.tree.map(jnp.zeros_like, at)

        if not self.start:
            return jax.value_and_grad(loss)(at)
        return jax.lax.cond(begun, jax.value_and_grad(loss), nothing, at)

    def last_pass(
        self, loss: Loss, params: Params, sets: Sets, state: PanaceaState
    ) -> PanaceaState:
        """With ``final_epsilon="mean"``: ε from the gradient over the whole harmful set at the final w."""
        if self.final_epsilon == "last":
            return state
        spared = [mean_gradient(loss, params, sets[name]) for name in self.off]
        rho = self._radius(params, state)
        off = _off(rho)

        def whole_gradient(w: Params, _: int = 0) -> Params:
            return off(mean_gradient(loss, w, sets["harmful"]), spared)

        return state._replace(epsilon=self._ascend(params, whole_gradient(params), whole_gradient, rho))

    def finish(self, params: Params, state: PanaceaState) -> Params:
        """``w + ε``."""
        return jax.tree.map(jnp.add, params, state.epsilon)

    def epsilon(self, state: PanaceaState) -> Params:
        """ε."""
        return state.epsilon

    def epsilon_mean(self, state: PanaceaState) -> Params:
        """Its running mean."""
        return state.epsilon_mean
