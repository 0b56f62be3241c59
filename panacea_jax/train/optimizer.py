"""The tail that every defence shares: clip the global norm → AdamW with a schedule."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from ml_collections import ConfigDict

from panacea_jax.defences import Defence, Method
from panacea_jax.errors import InputError

SCHEDULES = ("constant", "cosine", "linear")


def clip_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale the whole tree by ``min(1, c / (‖g‖ + 1e-6))``.

    The 1e-6 is PyTorch's (``clip_grad_norm_``), which optax's own clip lacks; with it ten float64 steps agree with a PyTorch trainer to
    1e-8.
    """

    def update(g: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(g) + 1e-6))
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), g), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@functools.lru_cache(maxsize=64)
def learning_rate(
    peak: float, steps: int, schedule: str = "constant", warmup_ratio: float = 0.0
) -> optax.Schedule:
    """Learning rate by step, as the schedules of the same names in transformers.

    "constant" has no warm-up, whatever ``warmup_ratio`` says (as in the reference scripts); "linear" and "cosine" rise linearly from 0
    over ``ceil(warmup_ratio · steps)`` steps and fall to 0 at the last.

    Raises:
        InputError: unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"config.optimizer.schedule = {schedule!r}: one of {', '.join(SCHEDULES)}")
    if schedule == "constant":
        return optax.constant_schedule(peak)
    warmup = -int(-warmup_ratio * steps // 1)
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    rest = max(steps - warmup, 1)
    fall = (
        optax.linear_schedule(peak, 0.0, rest)
        if schedule == "linear"
        else optax.cosine_decay_schedule(peak, rest)
    )
    return optax.join_schedules([rise, fall], [warmup]) if warmup else fall


class Partial(optax.GradientTransformationExtraArgs):
    """An optimizer that may leave some layers out of a step: ``update(grads, state, params, trained=…)``.

    ``trained`` is a tree like ``params`` of bools, one for each entry of a leaf's first axis or one for the whole leaf. What is left out
    keeps its value, its moments and its count of steps, as a tensor without a gradient does in PyTorch. Its ``grads`` must be zero, so that
    the clip does not count them.
    """


class PartialAdamState(NamedTuple):
    """Attributes:
    count: steps taken by each entry of each leaf's first axis; Adam's bias correction goes by it.
    mu: first moments.
    nu: second moments.
    """

    count: Any
    mu: Any
    nu: Any


def where_trained(trained: Any, x: Any, otherwise: Any) -> Any:
    """Leaf by leaf ``x`` where something is trained, else ``otherwise``; ``trained`` as in :class:`Partial`."""

    def pick(mask: Any, x: Array, y: Array) -> Array:
        mask = jnp.asarray(mask)
        return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, y)

    return jax.tree.map(pick, trained, x, otherwise)


def _only_trained() -> Partial:
    """Zero for what is left out."""

    def update(g: Any, state: Any, params: Any = None, *, trained: Any) -> tuple[Any, Any]:
        return where_trained(trained, g, jax.tree.map(jnp.zeros_like, g)), state

    return Partial(lambda params: optax.EmptyState(), update)


def _partial_adam(b1: float, b2: float, eps: float) -> Partial:
    """``optax.scale_by_adam`` with a count of its own for each layer of each leaf."""

    def init(params: Any) -> PartialAdamState:
        count = jax.tree.map(lambda p: jnp.zeros(p.shape[:1], jnp.int32), params)
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return PartialAdamState(count, mu, nu)

    def corrected(moment: Array, decay: float, count: Array) -> Array:
        # A layer never trained has done no step; what comes of it is dropped, but must not be 0/0.
        weight = 1 - decay ** jnp.maximum(count, 1).astype(moment.dtype)
        return moment / weight.reshape(weight.shape + (1,) * (moment.ndim - weight.ndim))

    def update(
        g: Any, state: PartialAdamState, params: Any = None, *, trained: Any
    ) -> tuple[Any, PartialAdamState]:
        count = jax.tree.map(lambda c: c + 1, state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, g)
        nu = jax.tree.map(lambda n, g: b2 * n + (1 - b2) * g**2, state.nu, g)
        new = PartialAdamState(
            *(map(functools.partial(where_trained, trained), (count, mu, nu), state))
        )
        out = jax.tree.map(
            lambda m, n, c: corrected(m, b1, c) / (jnp.sqrt(corrected(n, b2, c)) + eps),
            new.mu, new.nu, new.count,
        )  # fmt: skip
        return out, new

    return Partial(init, update)


# Equal arguments give the same object, which is what lets runs share a compiled step.
@functools.lru_cache(maxsize=64)
def make_optimizer(
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: float = 1.0,
    partial: bool = False,
) -> optax.GradientTransformation:
    """Clip → AdamW (decoupled decay on every trainable tensor). ``clip_norm`` 0 switches the clip off.

    ``partial=True`` is for a defence that leaves layers out of a step, see :class:`Partial`.
    """
    clip = clip_global_norm(clip_norm) if clip_norm else optax.identity()
    if partial:
        chain = optax.chain(
            clip,
            _partial_adam(b1, b2, eps),
            optax.add_decayed_weights(weight_decay),
            _only_trained(),
            optax.scale_by_learning_rate(learning_rate),
        )
        return Partial(*chain)
    adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return optax.chain(clip, adamw) if clip_norm else adamw


def optimizer_of(
    section: ConfigDict, rate: float | optax.Schedule, defence: Method
) -> optax.GradientTransformation:
    """The optimizer of an ``optimizer`` section at a learning rate, in the form that a defence needs."""
    return make_optimizer(
        rate, weight_decay=section.weight_decay, b1=section.b1, b2=section.b2, eps=section.eps,
        clip_norm=section.clip_norm, partial=isinstance(defence, Defence) and defence.partial,
    )  # fmt: skip
