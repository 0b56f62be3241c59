"""λ and ρ by what a step measures, in place of two numbers that carry over to no other model: what ``rho = "auto"`` does in training.

Each piece has a key of its own; "auto" is all four, with the constants of ``OF_AUTO``.

    piece, key             rule                                                  why
    ---------------------  ----------------------------------------------------  -----------------------------------------------------
    cap, tau               λ_t ≤ τ ‖g‖ / ‖h' − h‖                                once the task is learnt ‖g‖ falls and λ (h' − h) is all
                                                                                 that is left; Adam moves at full rate whatever its
                                                                                 size, and w runs away
    share, rho_relative    ρ_t = r ‖w − w₀‖, in place of ρ                       ε undoes part of the way that training went, which is
                                                                                 the only length there is to measure it by
    ceiling, ceiling       ρ_t shrinks by a tenth where L_harm(w + ε) >          ε is to bring back the refusals of the start, and no
                           c L_harm(w₀), or the rise is less than ¼ ⟨h, ε⟩;      more: beyond it answers turn to gibberish. Without
                           else it grows back, up to what it would be            poison the loss is there from the first, and ρ goes to 0
    poison, by_poison      λ_t = λ p̂, p̂ = Σ ⟨g, h⟩ / Σ ⟨h, h⟩ over the steps,    room for ε is needed against harm alone: without poison
                           cut to [0, 1]                                         w is plain SFT's

The ceiling is a trust region: a radius carried from step to step, held against the predicted rise ⟨h, ε⟩ (ρ ‖h‖ for the closed form).
p̂ is the least-squares fit of g ≈ p h, a running mean of the steps' estimates by their weight ‖h‖²: g ≈ (1 − p) g_clean + p h, and g_clean
is taken to be orthogonal to h. All of it stands in the state, so a resumed run goes on as it was.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import Metrics, Params
from panacea_jax.perturbation import inner

# Of the radius a step; of the predicted rise; and the least share of ρ, from which it can still grow back.
SHRINK, LEAST_RISE, LEAST_SHARE = 0.9, 0.25, 2.0**-10


class Steered(NamedTuple):
    """What steering carries from step to step.

    Attributes:
        start: w₀, kept only for ``rho_relative``; else empty.
        start_loss: L_harm(w₀), the mean over the harmful set; 0 where there is no ceiling.
        share: of ρ, what the ceiling leaves.
        along: Σ ⟨g, h⟩ over the steps that made harmful passes.
        square: Σ ⟨h, h⟩.
    """

    start: Params
    start_loss: Float[Array, ""]
    share: Float[Array, ""]
    along: Float[Array, ""]
    square: Float[Array, ""]

    @property
    def poison(self) -> Float[Array, ""]:
        """p̂, the share of harm in the user's records; 0 before anything was seen."""
        fit = self.along / jnp.where(self.square > 0, self.square, 1.0)
        return jnp.clip(fit, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Steering:
    """The pieces in use.

    Attributes:
        lam: λ before anything is measured.
        tau: τ; None or 0: no cap.
        rho_relative: r; None: ρ is a length.
        ceiling: c; None: ρ stays.
        by_poison: λ goes by p̂.
    """

    lam: float | int
    tau: float | int | None = None
    rho_relative: float | int | None = None
    ceiling: float | int | None = None
    by_poison: bool = False

    def __bool__(self) -> bool:
        return bool(self.tau or self.rho_relative is not None or self.ceiling or self.by_poison)

    def init(self, params: Params) -> Steered:
        """Nothing measured yet; w₀ = w."""
        start = jax.tree.map(jnp.copy, params) if self.rho_relative is not None else ()
        dtype = jax.tree.leaves(params)[0].dtype
        # Each a buffer of its own, since the state is donated.
        return Steered(start, *(jnp.full((), value, dtype) for value in (0, 1, 0, 0)))

    def look(self, state: Steered, loss: Loss, params: Params, harmful: Iterable[Any]) -> Steered:
        """L_harm(w₀), for a ceiling."""
        if not self.ceiling:
            return state
        sums = [_summed(loss, params, batch) for batch in harmful]
        total, tokens = (sum(parts[1:], parts[0]) for parts in zip(*sums))
        mean = total / jnp.maximum(tokens, 1)
        return state._replace(start_loss=mean.astype(state.start_loss.dtype))

    def radius(self, state: Steered, rho: Any, params: Params) -> Any:
        """ρ_t; ``rho`` is the length that holds unless it is relative."""
        if self.rho_relative is not None:
            way = optax.tree.norm(jax.tree.map(jnp.subtract, params, state.start))
            rho = self.rho_relative * way
        return state.share * rho if self.ceiling else rho

    def measure(
        self,
        state: Steered,
        along: Float[Array, ""],
        h: Params,
        epsilon: Params,
        loss: Float[Array, ""],
        loss_perturbed: Float[Array, ""],
    ) -> Steered:
        """Take in what a step's harmful passes found.

        Args:
            state: so far.
            along: ⟨g, h⟩.
            h: harmful gradient at w.
            epsilon: ε.
            loss: L_harm(w). loss_perturbed: L_harm(w + ε).
        """
        square = state.square + inner(h, h)
        state = state._replace(along=state.along + along, square=square)
        if not self.ceiling:
            return state
        high = loss_perturbed > self.ceiling * state.start_loss
        bent = loss_perturbed - loss < LEAST_RISE * inner(h, epsilon)
        share = state.share * jnp.where(high | bent, SHRINK, 1 / SHRINK)
        return state._replace(share=jnp.clip(share, LEAST_SHARE, 1.0).astype(state.share.dtype))

    def strength(
        self, state: Steered, norm_g: Float[Array, ""], norm_difference: Float[Array, ""]
    ) -> Float[Array, ""]:
        """λ_t."""
        lam = self.lam * state.poison if self.by_poison else jnp.full_like(norm_g, self.lam)
        if not self.tau:
            return lam
        moves = norm_difference > 0
        most = self.tau * norm_g / jnp.where(moves, norm_difference, 1.0)
        return jnp.where(moves, jnp.minimum(lam, most), lam)

    def metrics(self, state: Steered, lam: Float[Array, ""]) -> Metrics:
        """Scalars to log."""
        return {"lam": lam, "poison_mean": state.poison, "rho_share": state.share}


# Reasoned, not searched for: 2 p̂ is the λ of 0.2 that held in the miniature at p = 0.1; with τ below 1 every update lowers the task loss
# to first order; r is in the middle of the range of docs/diagnostics.md; c = 1 is the model that training began with.
OF_AUTO = Steering(lam=2.0, tau=0.5, rho_relative=0.1, ceiling=1.0, by_poison=True)


@jax.jit
def _summed(loss: Loss, params: Params, batch: Any) -> tuple[Array, Array]:
    return loss.summed(params, batch)
