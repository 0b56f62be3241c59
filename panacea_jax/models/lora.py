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
    layer_numbers,
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
    layers: Any = "",
    dtype: Any = jnp.float32,
) -> Adapter:
    """A fresh adapter: A uniform in ±1/√in (as PEFT), B zero, so that the model is unchanged. ``rslora``, ``dropout`` as of
    :class:`Adapter`, ``layers`` as of :func:`panacea_jax.models.adapter.layer_numbers`.

    Raises:
        InputError: rank below 1, a dropout that is no probability, unknown targets or layers.
    """
    if rank < 1:
        raise InputError(f"config.lora.rank = {rank}: a rank is at least 1")
    if not 0 <= dropout < 1:
        raise InputError(f"config.lora.dropout = {dropout}: a probability of 0 or more, below 1")
    names = target_names(targets)
    all_shapes = abstract_model(model.config)[1]
    numbers = layer_numbers(layers, model.config.num_layers)
    n = model.config.num_layers if numbers is None else len(numbers)
    shapes = {name: all_shapes[f"layers/{BLOCK_OF[name]}/{name}/kernel"] for name in names}

    def build(key: Any) -> dict[str, Any]:
        stacks: dict[str, Any] = {}
        for name, k in zip(names, jax.random.split(key, len(names))):
            _, d_in, d_out = shapes[name]
            bound = 1.0 / math.sqrt(d_in)
            a = jax.random.uniform(k, (n, d_in, rank), dtype, -bound, bound)
            stacks.setdefault(BLOCK_OF[name], {})[name] = {
                "a": a,
                "b": jnp.zeros((n, rank, d_out), dtype),
            }
        return stacks

    places = adapter_shardings(model.mesh, jax.eval_shape(build, key))
    stacks = jax.jit(build, out_shardings=places)(key)
    return Adapter(stacks, rank, float(alpha), rslora, float(dropout), numbers)
