"""Machines by name, and the devices of TPU topologies that are not there (``v5e:4x4``)."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from panacea_jax.errors import InputError
from panacea_jax.parallel.chips import CHIPS, Chip
from panacea_jax.planning.gpu_target import gpu_devices

GPUS = tuple(name for name, chip in CHIPS.items() if chip.platform == "gpu")


class Topology(NamedTuple):
    """A machine to plan for.

    Attributes:
        name: as the user wrote it.
        chip: data sheet.
        chips: how many, of all slices.
        devices: those that a program can be compiled for, or None where only the memory model speaks (GPUs without their compiler).
        slices: of TPUs, joined by the data centre's network.
    """

    name: str
    chip: Chip
    chips: int
    devices: Sequence[Any] | None
    slices: int = 1

    @property
    def kind(self) -> str:
        """Name of the chip."""
        return next(name for name, chip in CHIPS.items() if chip == self.chip)

    @property
    def size(self) -> int:
        """Devices as JAX counts them."""
        return self.chips * self.chip.devices


def topology(name: str) -> Topology:
    """``v5e:4x4``, ``v5p:2x2x1``, ``tpu7x:2x2x1``, two slices ``2*v5e:4x4``, or ``gpu:h100x8``.

    Raises:
        InputError: a name of another form, an unknown chip, slices of one whose network no page gives, a shape that does not exist, or
            libtpu is not installed.
    """
    if gpu := re.fullmatch(r"gpu:(\w+?)x(\d+)", name):
        if gpu[1] not in GPUS or int(gpu[2]) < 1:
            raise InputError(
                f"--topology={name}: known GPUs are {', '.join(GPUS)}, like gpu:h100x8"
            )
        return Topology(name, CHIPS[gpu[1]], int(gpu[2]), gpu_devices(name, gpu[1], int(gpu[2])))
    tpu = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+){1,2})", name)
    kinds = [kind for kind in CHIPS if kind not in GPUS]
    if tpu is None or tpu[2] not in kinds:
        raise InputError(
            f"--topology={name}: write KIND:SHAPE with one of {', '.join(kinds)}, like v5e:4x4, two slices of it as 2*v5e:4x4, "
            "or gpu:h100x8"
        )
    slices, kind, shape = int(tpu[1] or 1), tpu[2], [int(n) for n in tpu[3].split("x")]
    chip = CHIPS[kind]
    if slices != 1 and (slices < 1 or not chip.network):
        able = ", ".join(kind for kind, chip in CHIPS.items() if chip.network)
        raise InputError(f"--topology={name}: several slices can be planned of {able}")
    devices = _devices(name, kind, shape, slices)
    return Topology(name, chip, slices * math.prod(shape), devices, slices)


def _devices(name: str, kind: str, shape: list[int], slices: int) -> Sequence[Any]:
    """The devices of a TPU topology, from libtpu; no TPU is needed."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")  # it warns of every machine that is no TPU
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    # Without it libtpu asks the cloud's metadata server what machine this is, and waits for an answer.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Only the compiler is wanted: another process may hold the lock on a TPU, or on libtpu itself.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Two cores of a v4 or v5p chip act as one device.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind in ("v4", "v5p") else {}
    options["chips_per_host_bounds"] = (min(shape[0], 2), min(shape[1], 2), 1)
    if slices > 1:
        options["num_slices"] = slices
    one = name.rpartition("*")[2]
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=one, **options).devices
    except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        if "not installed" in reason:
            reason = "planning for TPUs needs libtpu: pip install libtpu"
        raise InputError(f"--topology={name}: {reason}") from error
