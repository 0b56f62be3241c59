"""The device mesh: axes ``data``, ``fsdp`` and ``tensor``."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from panacea_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Arrange the devices as a ``data × fsdp × tensor`` mesh.

    At most one axis may be -1; it takes whatever devices are left. Elsewhere devices come in jax's order, so that ``tensor`` joins
    neighbours; on TPUs the axes follow the links of the torus, and of several slices ``data`` alone crosses the network between them.

    Raises:
        InputError: an axis is 0 or below -1, two axes are -1, the axes do not divide the devices, or ``data`` not the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(data, fsdp, tensor, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu":
        grid = np.asarray(devices, dtype=object).reshape(sizes)
    elif slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif sizes[0] % slices:
        raise InputError(
            f"config.mesh.data = {sizes[0]}: there are {slices} slices, and only data may cross the network between them; "
            f"make it a multiple of {slices}"
        )
    else:
        within = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def stand_in_mesh(data: int, fsdp: int, tensor: int, count: int) -> Mesh:
    """The same for ``count`` devices that are not there: one of ours in every place. Good for shapes and shardings, not for programs.

    Raises:
        InputError: as :func:`make_mesh`.
    """
    return make_mesh(data, fsdp, tensor, jax.devices()[:1] * count)


def mesh_sizes(data: int, fsdp: int, tensor: int, count: int) -> tuple[int, ...]:
    """Devices along each axis.

    Raises:
        InputError: as :func:`make_mesh`.
    """
    sizes = dict(zip(AXES, (data, fsdp, tensor)))
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
        sizes[open_axes[0]] = count // fixed
    elif fixed != count:
        raise InputError(
            f"config.mesh: {data} x {fsdp} x {tensor} = {fixed} devices, but there are "
            f"{count}; set one axis to -1 to take what is left"
        )
    return tuple(sizes.values())
