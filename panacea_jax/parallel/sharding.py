"""Ordered (pattern → axes) rules that place every array on the mesh; the first match wins.

Paths are the tree's keys joined by ``/``, e.g. ``layers/self_attn/q_proj/kernel``. Kernels are stored ``[layers, in, out]``,
so a column-parallel matrix (q, k, v, gate, up) splits ``out`` over ``tensor`` and a row-parallel one (o, down) splits ``in``;
the other dimension is split over ``fsdp``. The layer dimension is never split: the scan takes one layer at a time. The factors of an
adapter lie as their matrix does, the rank being whole, once they are large. Rows of batches, activations and caches are split over all
axes but ``tensor``. Optimizer and ε lie as what is trained (``train.step.state_shardings``).
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from panacea_jax.errors import InputError

Axes = tuple[str | None, ...]
Rules = tuple[tuple[str, Axes], ...]

# Axes that split the rows of a batch.
ROWS = ("replica", "data", "fsdp")

# An axis with "?" is left out where it does not divide its dimension: vocabularies of odd sizes are common (Alpaca's padding token makes
# 32001), and their tables small beside the layers. Any other axis that does not is an error.
WEIGHT_RULES: Rules = (
    (r"embed_tokens/embedding$", ("tensor?", "fsdp?")),
    (r"lm_head/kernel$", ("fsdp?", "tensor?")),
    (r"score/kernel$", ("fsdp?",)),
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel$", (None, "fsdp", "tensor")),
    (r"(o_proj|down_proj)/kernel$", (None, "tensor", "fsdp")),
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/bias$", (None, "tensor")),
    (r".*", ()),
)

ADAPTER_RULES: Rules = (
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/a$", (None, "fsdp")),
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/b$", (None, None, "tensor")),
    (r"(o_proj|down_proj)/a$", (None, "tensor")),
    (r"(o_proj|down_proj)/b$", (None, None, "fsdp")),
)

# Bytes of a factor, all layers together, from which on it is split. Rank 32 on a 7B model stays whole on every device (16 MiB a factor,
# no traffic for its gradient but the sum); on a 70B model (80 MiB and more, and five times that with moments and ε) it would crowd a chip.
ADAPTER_SPLIT_FROM = 32 * 2**20


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device (scalars, small adapters)."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch ``[B, ...]`` split over all axes but ``tensor``."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def batch_rows(mesh: Mesh) -> int:
    """Number of equal parts that a batch is cut into: batches are padded to a multiple of it."""
    return int(np.prod([mesh.shape[axis] for axis in ROWS]))


def weight_sharding(
    mesh: Mesh, path: str, shape: tuple[int, ...], uneven: bool = False
) -> NamedSharding:
    """Sharding of one weight by the first rule that matches its path.

    Args:
        mesh: devices.
        path: of the weight.
        shape: likewise.
        uneven: leave out every axis that does not divide its dimension.

    Raises:
        InputError: an axis does not divide a dimension of a layer's weight; names both and the weight.
    """
    return _place(mesh, WEIGHT_RULES, path, shape, uneven)


def adapter_shardings(mesh: Mesh, layers: Any) -> Any:
    """Sharding of each factor of an adapter's ``layers``, arrays or shapes: as its matrix from ``ADAPTER_SPLIT_FROM`` on, else whole.

    Raises:
        InputError: as :func:`weight_sharding`.
    """

    def place(path: Any, x: Any) -> NamedSharding:
        if x.size * x.dtype.itemsize < ADAPTER_SPLIT_FROM:
            return replicated(mesh)
        name = "/".join(str(key.key) for key in path)
        return _place(mesh, ADAPTER_RULES, f"layers/{name}", x.shape)

    return jax.tree.map_with_path(place, layers)


def _place(
    mesh: Mesh, rules: Rules, path: str, shape: tuple[int, ...], uneven: bool = False
) -> NamedSharding:
    axes = next(rule for pattern, rule in rules if re.search(pattern, path))
    spec: list[str | None] = []
    for dim, asked in zip(shape, axes):
        axis = asked and asked.removesuffix("?")
        if axis and dim % mesh.shape[axis]:
            if axis == asked and not uneven:
                raise InputError(
                    f"config.mesh.{axis} = {mesh.shape[axis]}: does not divide {dim}, dimension {len(spec)} of {path} {list(shape)}"
                )
            axis = None
        if axis and axis in spec:
            raise InputError(f"{path} {list(shape)}: its rule splits two dimensions over {axis}")
        spec.append(axis)
    return NamedSharding(mesh, PartitionSpec(*spec))


def bytes_per_device(sharding: NamedSharding, shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of one device's shard."""
    return int(np.prod(sharding.shard_shape(shape), dtype=np.int64)) * itemsize
