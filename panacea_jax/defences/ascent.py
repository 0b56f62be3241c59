"""Ascent: Panacea's perturbation added to finished weights, without Panacea's training.

    K = 1    ε = ρ h/‖h‖,  h = ∇L_harm(w) over the whole harmful set                                          deployed: w + ε
    K > 1    max_{‖ε‖≤ρ} L_harm(w + ε),  ε ← proj_{‖ε‖≤ρ}(ε + η d/‖d‖),  η = 2.5 ρ/K,  a harmful batch a step

Stage: post-fine-tuning, one shot. Passes: one over the harmful set and over each set that is kept; with K > 1 one batch of each a step.
Extra memory: ε, and a gradient of each set. Extra data: ``harmful``, and the sets of ``keep``.

The losses of the sets in ``keep`` (the task's, benign requests') are constraints of the ascent. With "project" d is the harmful gradient
taken off the span of theirs, which changes none of them to first order. With "lagrangian" they may rise by ``slack``:
``d = ∇L_harm − Σ μ_i ∇L_i`` at w + ε, and a dual step ``μ_i ← max(0, μ_i + dual_rate (L_i(w + ε) − L_i(w) − slack))``.

No paper's method: K = 1 is the ε that Panacea ends with (arXiv 2501.18100, ``final_epsilon="mean"``) on weights that were not prepared
for it; the step of K > 1 is that of projected ascent on inputs (Madry et al., arXiv 1706.06083). ``rho="auto"`` is a radius chosen on
held-out records, see ``panacea_jax.healing``.
"""

import dataclasses
import functools
import itertools
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from panacea_jax.defences.loss import Loss, mean_gradient
from panacea_jax.defences.protocol import (
    Facts,
    Method,
    Params,
    Sets,
    Stage,
    StreamSpec,
    check_counts,
    check_not_negative,
)
from panacea_jax.errors import InputError
from panacea_jax.perturbation import off_span, onto_ball, to_sphere

AUTO = "auto"
KEEPABLE = ("user", "benign", "alignment")
# Length of all steps together, in radii.
STRIDE = 2.5


class AscentState(NamedTuple):
    """ε, same tree as ``params``, and the multipliers of the sets that are kept (zeros unless "lagrangian")."""

    epsilon: Params
    multipliers: Float[Array, "kept"]


@dataclasses.dataclass(frozen=True)
class Ascent(Method):
    """Add the ε, ‖ε‖ ≤ ρ, that raises the loss of harmful answers most.

    Attributes:
        rho: ρ, L2 radius of ε over all trainable tensors together; "auto": chosen on held-out records.
        steps: K; 1 is the closed form.
        keep: sets whose losses are to stay, of ``KEEPABLE``: the user's records, benign ones, refusals.
        constraint: how they stay: "project" or "lagrangian".
        slack: nats a token by which each may rise, with "lagrangian".
        dual_rate: length of the dual step, in multipliers a nat.
    """

    rho: float | int | str = AUTO
    steps: int = 1
    keep: tuple[str, ...] = ()
    constraint: Literal["project", "lagrangian"] = "project"
    slack: float | int = 0.05
    dual_rate: float | int = 10.0

    stage: ClassVar[Stage] = "heal"
    facts: ClassVar[Facts] = Facts(
        title="ascent",
        paper="arXiv 2501.18100, its ε alone",
        memory="ε, and a gradient of each set",
        code="Panacea's ε over the whole harmful set, on weights that were not trained for it",
    )

    def __post_init__(self) -> None:
        if isinstance(self.rho, str):
            if self.rho != AUTO:
                raise InputError(f"config.defence.rho = {self.rho!r}: a radius, or 'auto'")
        else:
            check_not_negative(rho=self.rho)
        check_counts(steps=self.steps)
        check_not_negative(slack=self.slack, dual_rate=self.dual_rate)
        unknown = [name for name in self.keep if name not in KEEPABLE]
        if unknown or len(set(self.keep)) < len(self.keep):
            raise InputError(f"config.defence.keep = {self.keep}: some of {', '.join(KEEPABLE)}, each once")
        if self.constraint not in ("project", "lagrangian"):
            raise InputError(f"config.defence.constraint = {self.constraint!r}: 'project' or 'lagrangian'")
        if self.constraint == "lagrangian" and (self.steps == 1 or not self.keep):
            raise InputError(
                "config.defence.constraint = lagrangian: prices what config.defence.keep names from the second of "
                "config.defence.steps on; set both"
            )

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """The harmful set and those that are kept: a look at each, or a batch a step; a price needs the loss at w as well."""
        if self.steps == 1:
            return dict.fromkeys(("harmful", *self.keep), StreamSpec(whole_passes=1.0))
        kept = 1.5 if self.constraint == "lagrangian" else 1.0
        return {
            "harmful": StreamSpec(single_batches=float(self.steps)),
            **dict.fromkeys(self.keep, StreamSpec(single_batches=kept * self.steps)),
        }

    def init(self, params: Params) -> AscentState:
        """ε = 0."""
        return AscentState(jax.tree.map(jnp.zeros_like, params), jnp.zeros(len(self.keep)))

    def first_pass(
        self, loss: Loss, params: Params, sets: Sets, state: AscentState
    ) -> AscentState:
        """Find ε.

        Raises:
            InputError: ρ is still "auto".
        """
        if isinstance(self.rho, str):
            raise InputError("config.defence.rho = 'auto': is chosen by `panacea heal`, in Python by pj.heal")
        if self.steps == 1:
            h, *kept = (mean_gradient(loss, params, sets[name]) for name in ("harmful", *self.keep))
            sphere = to_sphere(self.rho)
            epsilon, _ = sphere.update(off_span(h, kept), sphere.init(params))
            return state._replace(epsilon=epsilon)
        batches = {name: itertools.cycle(sets[name]) for name in ("harmful", *self.keep)}
        for _ in range(self.steps):
            taken = {name: next(those) for name, those in batches.items()}
            state = _climb(self, loss, params, taken, state)
        return state

    def finish(self, params: Params, state: AscentState) -> Params:
        """``w + ε``."""
        return jax.tree.map(jnp.add, params, state.epsilon)

    def epsilon(self, state: AscentState) -> Params:
        """ε."""
        return state.epsilon

    def report(self, params: Params, state: AscentState) -> dict[str, Any]:
        """The norm of ε, and the multipliers where losses are priced."""
        found: dict[str, Any] = {"norm_epsilon": float(optax.tree.norm(state.epsilon))}
        if self.constraint == "lagrangian":
            found["multipliers"] = dict(zip(self.keep, map(float, state.multipliers)))
        return found


@functools.partial(jax.jit, static_argnames="method")
def _climb(
    method: Ascent, loss: Loss, params: Params, batches: dict[str, Any], state: AscentState
) -> AscentState:
    """One projected step of several."""
    assert not isinstance(method.rho, str)
    epsilon, multipliers = state
    at = jax.tree.map(jnp.add, params, epsilon)
    d = jax.grad(loss)(at, batches["harmful"])
    found = [jax.value_and_grad(loss)(at, batches[name]) for name in method.keep]
    gradients = [gradient for _, gradient in found]
    if method.constraint == "project":
        d = off_span(d, gradients)
    else:
        for i, (value, gradient) in enumerate(found):
            price = multipliers[i]
            d = jax.tree.map(lambda x, g, price=price: x - (price * g).astype(x.dtype), d, gradient)
            excess = value - loss(params, batches[method.keep[i]]) - method.slack
            priced = jnp.maximum(0.0, price + method.dual_rate * excess)
            multipliers = multipliers.at[i].set(priced.astype(multipliers.dtype))
    ascent = optax.chain(to_sphere(STRIDE * method.rho / method.steps), onto_ball(method.rho))
    update, _ = ascent.update(d, ascent.init(epsilon), epsilon)
    return AscentState(optax.apply_updates(epsilon, update), multipliers)
