"""The device mesh: axes ``replica``, ``data``, ``fsdp`` and ``tensor``."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from panacea_jax.errors import InputError

AXES = ("replica", "data", "fsdp", "tensor")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
    *,
    replica: int = 0,
) -> Mesh:
    """Arrange the devices as a ``replica × data × fsdp × tensor`` mesh.

    At most one axis may be -1; it takes whatever devices are left. Elsewhere devices come in jax's order, so that ``tensor`` joins
    neighbours; on TPUs the axes follow the links of the torus.

    Args:
        data: copies of the weights within a slice.
        fsdp: parts that weights are cut into.
        tensor: parts that heads and hidden units are cut into.
        devices: all of JAX's by default.
        replica: copies of the weights of which only gradients cross the slow network between slices of TPUs; 0: one for each slice.

    Raises:
        InputError: an axis is 0 or below -1, two axes are -1, the axes do not divide the devices, or ``replica`` not the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = slices_of(devices)
    sizes = mesh_sizes(
        {"replica": replica or slices, "data": data, "fsdp": fsdp, "tensor": tensor}, len(devices)
    )
    if devices[0].platform != "tpu" or len(set(devices)) < len(devices):  # stand-ins have no links
        grid = np.asarray(devices, dtype=object).reshape(sizes)
    elif slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif sizes[0] % slices:
        raise InputError(
            f"config.mesh.replica = {sizes[0]}: there are {slices} slices, and only replica may cross the network between them; "
            f"make it 0 or a multiple of {slices}"
        )
    else:
        within = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slices_of(devices: Iterable[Any]) -> int:
    """TPU slices that the devices belong to; 1 elsewhere (GPUs number their hosts so, which is for the user to use or not)."""
    return len({getattr(d, "slice_index", 0) if d.platform == "tpu" else 0 for d in devices})


def stand_ins(count: int) -> list[Any]:
    """As many devices, one of ours in every place: good for shapes and shardings, not for programs."""
    return jax.devices()[:1] * count


def mesh_sizes(sizes: dict[str, int], count: int) -> tuple[int, ...]:
    """Devices along each axis, once -1 is what is left.

    Raises:
        InputError: as :func:`make_mesh`.
    """
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise InputError(f"config.mesh.{axis} = {size}: a mesh axis is a positive number or -1")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise InputError(f"config.mesh: only one axis may be -1, not {' and '.join(open_axes)}")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if open_axes:
        if count % fixed:
            raise InputError(
                f"config.mesh: {fixed} (the product of the fixed axes) does not divide "
                f"the {count} devices"
            )
        sizes = sizes | {open_axes[0]: count // fixed}
    elif fixed != count:
        asked = " x ".join(str(size) for size in sizes.values())
        raise InputError(
            f"config.mesh: {asked} = {fixed} devices, but there are "
            f"{count}; set one axis to -1 to take what is left"
        )
    return tuple(sizes.values())
