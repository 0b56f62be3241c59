"""A radius that chooses itself: of an ascent on finished weights, and of the ε that a training left."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from panacea_jax.data.batches import Stream
from panacea_jax.defences import Ascent, Method
from panacea_jax.healing.choice import BUDGET, Budget
from panacea_jax.healing.radius import ChosenRadius, Looks, choose_radius, outer_radius
from panacea_jax.healing.sets import Exam
from panacea_jax.models.model import Model
from panacea_jax.progress import say
from panacea_jax.train.loop import Result
from panacea_jax.train.once import apply_once


def ascend_auto(
    model: Model,
    params: Any,
    method: Ascent,
    streams: Mapping[str, Stream],
    exam: Exam,
    budget: Budget = BUDGET,
) -> tuple[Result, ChosenRadius]:
    """Ascend, and go as far as held-out records say.

    One step gives a direction. Several are taken in a ball of half the radius at which, in that direction, too much is lost; theirs is then
    the direction, and the radius is chosen along it.

    Args:
        model: the base.
        params: the finished adapter, or all weights.
        method: with ``rho="auto"``.
        streams: one for each of ``method.streams``, without the held-out records.
        exam, budget: as of :func:`choose_radius`.

    Raises:
        InputError: as :func:`choose_radius`.
    """
    once = dataclasses.replace(method, rho=1.0, steps=1, constraint="project")
    result = apply_once(model, params, once, streams)
    if method.steps > 1:
        upper = outer_radius(Looks(model, params, result.epsilon, exam))
        result = apply_once(model, params, dataclasses.replace(method, rho=upper / 2), streams)
    return at_chosen_radius(result, method, exam, budget)


def at_chosen_radius(
    result: Result, method: Method, exam: Exam, budget: Budget = BUDGET
) -> tuple[Result, ChosenRadius]:
    """The same w and direction of ε, which goes as far as held-out records say.

    Args:
        result: of a method whose state has an ``epsilon``, of a length above 0.
        method: that method.
        exam, budget: as of :func:`choose_radius`.

    Raises:
        InputError: as :func:`choose_radius`.
    """
    say("ρ: choosing how far to go along ε, by held-out records")
    found = choose_radius(result.model, result.params, result.epsilon, exam, budget=budget)
    factor = found.radius / float(optax.tree.norm(result.epsilon))
    epsilon = jax.tree.map(lambda e: (factor * e).astype(e.dtype), result.epsilon)
    state = result.state._replace(epsilon=epsilon)
    deployed = method.finish(result.params, state)
    return dataclasses.replace(result, epsilon=epsilon, state=state, deployed=deployed), found
