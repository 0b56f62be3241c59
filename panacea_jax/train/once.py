"""Methods without steps: one look at their data sets, if they want one, and the finished weights are changed in one go."""

from collections.abc import Mapping
from typing import Any

import jax

from panacea_jax.data.batches import Stream
from panacea_jax.defences import Loss, Method
from panacea_jax.models.model import Model
from panacea_jax.train.feeding import streams_of, whole_sets
from panacea_jax.train.loop import Result
from panacea_jax.train.step import state_shardings


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
    needed = streams_of(model, defence, streams)
    # Jitted, so that noise of the size of the weights is drawn where they lie.
    places = state_shardings(jax.eval_shape(defence.init, params), params)
    state = jax.jit(defence.init, out_shardings=places)(params)
    sets = whole_sets(model, defence, needed)
    state = defence.first_pass(Loss.of(model), params, sets, state)
    deployed = defence.finish(params, state)
    return Result(model, params, defence.epsilon(state), deployed, state, 0, (), 0)
