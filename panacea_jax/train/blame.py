"""Which tensor, and which records, a run that stopped being numbers is to blame on.

A step notes which gradient is not finite (``step.first_nonfinite``); all else is looked at only once a run has failed.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from panacea_jax.data.batches import Stream
from panacea_jax.defences import Defence
from panacea_jax.models.model import Model
from panacea_jax.parallel import processes
from panacea_jax.train.checkpoints import flatten
from panacea_jax.train.feeding import record_numbers

# Records of a stream that are named, of a step that takes more.
NAMED = 20


class Blame:
    """Finds the culprit of a step; of several processes all must ask."""

    def __init__(
        self, model: Model, params: Any, defence: Defence, streams: Mapping[str, Stream], origin: Any = None
    ) -> None:
        """
        Args:
            model: base; its weights are looked at first.
            params: trainable tree, of which the names are taken.
            defence: whose streams these are.
            streams: that steps take records from.
            origin: the trainable tree as training began; None: not looked at.
        """
        self._model, self._defence, self._streams, self._origin = model, defence, streams, origin
        self._names = list(flatten(params))

    def records(self, step: int) -> str:
        """The records of a step (from 1) by stream, counted from 1: ``records 3, 7 of user, 12 of harmful``."""
        taken = self._taken(step)
        return "records " + ", ".join(f"{_listed(numbers)} of {name}" for name, numbers in taken.items())

    def cause(self, step: int, gradient: int) -> str:
        """What is the matter in a step (from 1), the first that is found of: a token id beyond the vocabulary; a tensor of the base, of the
        weights that training began with, of the gradients, each in the order of their names, that is not finite.

        Args:
            step: that failed.
            gradient: what ``first_nonfinite`` said of its gradients.
        """
        size = self._model.config.vocab_size
        for name, numbers in self._taken(step).items():
            for number in numbers:
                ids = self._streams[name].examples[number - 1].tokens
                if (beyond := ids[(ids < 0) | (ids >= size)]).size:
                    return f"record {number} of {name} has the token id {beyond[0]}, beyond the vocabulary of {size}"
        for what, tree in (("base", self._model.weights), ("start of training", self._origin)):
            for name, x in flatten(tree).items():
                if (layer := _where(name, x)) is not None:
                    return f"tensor {name}{layer} of the {what} is not finite"
        if gradient >= 0:
            return f"the gradient of {self._names[gradient]} is the first that is not finite, by name"
        return "every tensor of the base, of the start of training and of the gradients is finite"

    def _taken(self, step: int) -> dict[str, list[int]]:
        return {
            name: [i + 1 for i in numbers]
            for name, numbers in record_numbers(self._streams, self._defence, step - 1).items()
        }


def _listed(numbers: list[int]) -> str:
    more = f" … ({len(numbers)} in all)" if len(numbers) > NAMED else ""
    return ", ".join(map(str, numbers[:NAMED])) + more


def _where(name: str, x: Any) -> str | None:
    """"" for a tensor that is not finite, or the first such layer of one that is of all layers, " (layer 3)"; None for a finite one."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return None
    finite = processes.to_host(_finite(x, stacked=name.startswith("layers.")))
    if finite.all():
        return None
    return f" (layer {int(np.argmin(finite))})" if finite.ndim else ""


@functools.partial(jax.jit, static_argnames="stacked")
def _finite(x: Any, stacked: bool) -> Any:
    return jnp.isfinite(x).all(axis=range(1, x.ndim) if stacked else None)
