"""The tail that every defence shares: clip the global norm → AdamW with a schedule."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

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
) -> optax.GradientTransformation:
    """Clip → AdamW (decoupled decay on every trainable tensor). ``clip_norm`` 0 switches the clip off."""
    adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return optax.chain(clip_global_norm(clip_norm), adamw) if clip_norm else adamw
