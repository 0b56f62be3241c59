"""Methods without steps: one look at their data sets, if they want one, and the finished weights are changed in one go."""

from collections.abc import Mapping
from typing import Any

from panacea_jax.data.batches import Stream
from panacea_jax.defences import Loss, Method
from panacea_jax.models.model import Model
from panacea_jax.train.loop import Result, whole_sets


def apply_once(model: Model, params: Any, defence: Method, streams: Mapping[str, Stream]) -> Result:
    """Change finished weights by a method that has no training steps.

    Args:
        model: the base; ``model.weights`` is None where ``params`` holds all weights.
        params: the finished adapter, or all weights.
        defence: a method of the stage heal.
        streams: one for each of ``defence.streams``.

    Raises:
        KeyError: a stream is missing.
    """
    missing = [name for name in defence.streams if name not in streams]
    if missing:
        raise KeyError(f"{type(defence).__name__} needs the data streams {missing}")
    state = defence.init(params)
    first_pass = getattr(defence, "first_pass", None)
    if first_pass is not None:
        state = first_pass(Loss.of(model), params, whole_sets(model, defence, streams), state)
    epsilon = getattr(state, "epsilon", None)
    return Result(model, params, epsilon, defence.finish(params, state), state, 0, (), 0)
