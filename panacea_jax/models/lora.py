"""LoRA adapters: make a fresh one, load one from a PEFT folder."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Key

from panacea_jax.errors import InputError
from panacea_jax.models.adapter import (
    BLOCK_OF,
    Adapter,
    AdapterSet,
    merge,
    side_by_side,
    target_names,
)
from panacea_jax.models.model import Model, abstract_model
from panacea_jax.models.peft import load_adapter as load
from panacea_jax.parallel.sharding import adapter_shardings

__all__ = ["Adapter", "AdapterSet", "init", "load", "merge", "side_by_side"]


def init(
    model: Model,
    rank: int,
    alpha: float | int,
    targets: Sequence[str] = ("q", "k", "v"),
    *,
    key: Key[jax.Array, ""],
    rslora: bool = False,
    dropout: float | int = 0.0,
    dtype: Any = jnp.float32,
) -> Adapter:
    """A fresh adapter: A uniform in ±1/√in (as PEFT), B zero, so that the model is unchanged. ``rslora``, ``dropout`` as of
    :class:`Adapter`.

    Raises:
        InputError: rank below 1, a dropout that is no probability, or unknown targets.
    """
    if rank < 1:
        raise InputError(f"config.lora.rank = {rank}: a rank is at least 1")
    if not 0 <= dropout < 1:
        raise InputError(f"config.lora.dropout = {dropout}: a probability of 0 or more, below 1")
    names = target_names(targets)
    all_shapes = abstract_model(model.config)[1]
    shapes = {name: all_shapes[f"layers/{BLOCK_OF[name]}/{name}/kernel"] for name in names}

    def build(key: Any) -> dict[str, Any]:
        layers: dict[str, Any] = {}
        for name, k in zip(names, jax.random.split(key, len(names))):
            n, d_in, d_out = shapes[name]
            bound = 1.0 / math.sqrt(d_in)
            a = jax.random.uniform(k, (n, d_in, rank), dtype, -bound, bound)
            layers.setdefault(BLOCK_OF[name], {})[name] = {
                "a": a,
                "b": jnp.zeros((n, rank, d_out), dtype),
            }
        return layers

    places = adapter_shardings(model.mesh, jax.eval_shape(build, key))
    layers = jax.jit(build, out_shardings=places)(key)
    return Adapter(layers, rank, float(alpha), rslora, float(dropout))
