"""All-parameter mode: the trainable tree is every weight, kept in float32."""

import dataclasses
from typing import Any

import jax

from panacea_jax.models.model import Model
from panacea_jax.models.precision import wide


def full_parameters(model: Model) -> tuple[Model, Any]:
    """``(the model without base weights, all weights in float32 as the trainable tree)``.

    Float32, because an update of 2e-5 of a weight is rounded away in bfloat16; the decoder casts to the compute dtype at use.
    """

    def widen(x: jax.Array) -> jax.Array:
        return x.astype(wide(x.dtype))

    params = jax.tree.map(widen, model.weights)
    return dataclasses.replace(model, weights=None), params
