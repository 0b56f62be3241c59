"""The device mesh: sizes, the open axis, errors."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from panacea_jax.errors import InputError
from panacea_jax.parallel.mesh import AXES, make_mesh


def devices(n):
    """n places for a device: a mesh is made of whatever it is given."""
    return list(jax.devices()[:1]) * n


@pytest.mark.parametrize(
    ("count", "sizes", "wanted"),
    [
        (1, (), (1, 1, 1)),
        (8, (), (8, 1, 1)),
        (8, (1, -1, 1), (1, 8, 1)),
        (8, (2, 2, 2), (2, 2, 2)),
        (8, (-1, 2, 2), (2, 2, 2)),
        (8, (1, 2, -1), (1, 2, 4)),
        (12, (-1, 3, 4), (1, 3, 4)),
    ],
)
def test_sizes(count, sizes, wanted):
    mesh = make_mesh(*sizes, devices=devices(count))
    assert mesh.axis_names == AXES == ("replica", "data", "fsdp", "tensor")
    assert tuple(mesh.shape[axis] for axis in AXES) == (1, *wanted)
    assert mesh.axis_types == (AxisType.Auto,) * 4


def test_replicas():
    mesh = make_mesh(1, -1, 2, devices=devices(12), replica=3)
    assert tuple(mesh.shape.values()) == (3, 1, 2, 2)
    with pytest.raises(InputError, match=r"config\.mesh\.replica = -2"):
        make_mesh(devices=devices(4), replica=-2)


def test_all_devices_in_order_by_default():
    assert list(make_mesh().devices.flat) == jax.devices()


@pytest.mark.parametrize(
    ("count", "sizes", "wanted"),
    [
        (8, (0, 1, 1), r"config\.mesh\.data = 0"),
        (8, (1, -2, 1), r"config\.mesh\.fsdp = -2"),
        (8, (-1, -1, 1), r"only one axis may be -1, not data and fsdp"),
        (8, (3, -1, 1), r"3 .* does not divide the 8 devices"),
        (8, (-1, 4, 4), r"16 .* does not divide the 8 devices"),
        (8, (2, 2, 1), r"2 x 2 x 1 = 4 devices, but there are 8"),
        (1, (1, 1, 2), r"1 x 1 x 2 = 2 devices, but there are 1"),
    ],
)
def test_impossible_sizes(count, sizes, wanted):
    with pytest.raises(InputError, match=wanted):
        make_mesh(*sizes, devices=devices(count))


class Tpu:
    """A chip of a slice, as far as laying out a mesh looks."""

    platform, device_kind, core_on_chip = "tpu", "TPU v5 lite", 0

    def __init__(self, slice_index, x, y):
        self.slice_index, self.coords = slice_index, (x, y, 0)
        self.id = self.process_index = 4 * slice_index + 2 * y + x


def slices(count):
    return [Tpu(s, x, y) for s in range(count) for y in range(2) for x in range(2)]


@pytest.mark.parametrize(
    ("replica", "data", "wanted"), [(0, 1, 2), (2, 1, 2), (4, 1, 4), (-1, 1, 4), (0, 2, 2)]
)
def test_only_replica_crosses_slices(replica, data, wanted):
    fsdp = 8 // wanted // data
    mesh = make_mesh(data, fsdp, 1, devices=slices(2), replica=replica)
    assert tuple(mesh.shape.values()) == (wanted, data, fsdp, 1)
    for half, grid in enumerate(np.split(mesh.devices, 2)):
        assert {device.slice_index for device in grid.flat} == {half}


def test_stand_ins_on_a_tpu_have_no_torus():
    """One chip in every place, as a plan for other machines has it."""
    mesh = make_mesh(1, 2, 2, devices=slices(1)[:1] * 4)
    assert tuple(mesh.shape.values()) == (1, 1, 2, 2)


def test_a_slice_is_not_cut():
    with pytest.raises(InputError, match=r"replica = 1: there are 2 slices, .* a multiple of 2"):
        make_mesh(1, 4, 2, devices=slices(2), replica=1)


def test_numbered_gpus_are_no_slices():
    gpus = [Tpu(s, x, y) for s in range(2) for y in range(2) for x in range(2)]
    for gpu in gpus:
        gpu.platform = "gpu"
    assert tuple(make_mesh(1, -1, 2, devices=gpus).shape.values()) == (1, 1, 4, 2)


def test_axes_follow_the_torus():
    """Round the ring, each device of a 2 × 2 slice is next to the one before."""
    ring = [device.coords for device in make_mesh(1, 4, 1, devices=slices(1)).devices.flat]
    steps = [sum(abs(a - b) for a, b in zip(x, y)) for x, y in zip(ring, ring[1:] + ring[:1])]
    assert steps == [1, 1, 1, 1]
