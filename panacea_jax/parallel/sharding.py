"""Ordered (pattern → axes) rules that place every array on the mesh; the first match wins.

Paths are the weight tree's keys joined by ``/``, e.g. ``layers/self_attn/q_proj/kernel``. Kernels are stored ``[layers, in, out]``,
so a column-parallel matrix (q, k, v, gate, up) splits ``out`` over ``tensor`` and a row-parallel one (o, down) splits ``in``;
the other dimension is split over ``fsdp``. The layer dimension is never split: the scan takes one layer at a time.
"""

import re

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from panacea_jax.errors import InputError

Axes = tuple[str | None, ...]

WEIGHT_RULES: tuple[tuple[str, Axes], ...] = (
    (r"embed_tokens/embedding$", ("tensor", "fsdp")),
    (r"lm_head/kernel$", ("fsdp", "tensor")),
    (r"score/kernel$", ("fsdp",)),
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel$", (None, "fsdp", "tensor")),
    (r"(o_proj|down_proj)/kernel$", (None, "tensor", "fsdp")),
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/bias$", (None, "tensor")),
    (r".*", ()),
)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device (adapters, ε, scalars)."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch ``[B, ...]`` split over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_rows(mesh: Mesh) -> int:
    """Number of equal parts that a batch is cut into: batches are padded to a multiple of it."""
    return int(mesh.shape["data"] * mesh.shape["fsdp"])


def weight_sharding(
    mesh: Mesh, path: str, shape: tuple[int, ...], uneven: bool = False
) -> NamedSharding:
    """Sharding of one weight by the first rule that matches its path.

    Args:
        mesh: devices.
        path: of the weight.
        shape: likewise.
        uneven: keep a dimension that its axis does not divide whole on every device, as is always done outside the layers.

    Raises:
        InputError: an axis does not divide a dimension of a layer's weight; names both and the weight.
    """
    axes = next(rule for pattern, rule in WEIGHT_RULES if re.search(pattern, path))
    spec: list[str | None] = []
    for dim, axis in zip(shape, axes):
        if axis is not None and dim % mesh.shape[axis]:
            # Vocabularies of odd sizes are common (Alpaca's padding token makes 32001), and their tables small beside the layers.
            if path.startswith("layers/") and not uneven:
                raise InputError(
                    f"config.mesh.{axis} = {mesh.shape[axis]}: does not divide {dim}, dimension {len(spec)} of {path} {list(shape)}"
                )
            axis = None
        spec.append(axis)
    return NamedSharding(mesh, PartitionSpec(*spec))


def bytes_per_device(sharding: NamedSharding, shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of one device's shard."""
    return int(np.prod(sharding.shard_shape(shape), dtype=np.int64)) * itemsize
