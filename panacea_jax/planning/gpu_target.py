"""NVIDIA GPUs that are not there, as XLA's compiler for them needs to be told of them.

The compiler is in ``jax[cuda13]`` (extra ``plan-gpu``); no driver and no GPU is needed. What it asks beyond a data sheet are sizes of
one multiprocessor: NVIDIA's CUDA C++ programming guide, table "Technical Specifications per Compute Capability", and the tuning guides of
each architecture; clocks are the boost clocks of the data sheets.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from panacea_jax.errors import InputError
from panacea_jax.parallel.chips import CHIPS

KIB, MIB = 2**10, 2**20
# Autotuning tries programs out, for which the GPU has to be there; so does the choice among Triton's tilings.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
# cuDNN and CUDA that programs are compiled for: those that jax[cuda13] brings.
DNN, RUNTIME = (9, 10), (13, 0)


class Multiprocessors(NamedTuple):
    """Of one kind of GPU.

    Attributes:
        name: as the driver calls it.
        cores: how many it has.
        fpus: float32 units of one.
        threads: that one holds at most.
        shared: KiB of shared memory of one; a block may ask for one KiB less.
        cache: MiB of the GPU's L2.
        clock: GHz.
    """

    name: str
    cores: int
    fpus: int
    threads: int
    shared: int
    cache: float
    clock: float


KINDS = {
    "l4": Multiprocessors("NVIDIA L4", 58, 128, 1536, 100, 48, 2.04),
    "a100": Multiprocessors("NVIDIA A100-SXM4-80GB", 108, 64, 2048, 164, 40, 1.41),
    "h100": Multiprocessors("NVIDIA H100 80GB HBM3", 132, 128, 2048, 228, 50, 1.98),
    "h200": Multiprocessors("NVIDIA H200", 132, 128, 2048, 228, 50, 1.98),
    "b200": Multiprocessors("NVIDIA B200", 148, 128, 2048, 228, 126.5, 1.965),
}


def target_config(kind: str) -> str:
    """What the compiler is told of a GPU: a ``GpuTargetConfigProto`` as text.

    Args:
        kind: a key of ``KINDS``.
    """
    gpu, chip = KINDS[kind], CHIPS[kind]
    major, minor = chip.compute_capability.split(".")
    about = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": gpu.threads,
        "shared_memory_per_block": 48 * KIB, "shared_memory_per_core": gpu.shared * KIB,
        "shared_memory_per_block_optin": (gpu.shared - 1) * KIB,
        "core_count": gpu.cores, "fpus_per_core": gpu.fpus, "clock_rate_ghz": gpu.clock,
        "registers_per_core_limit": 64 * KIB, "registers_per_block_limit": 64 * KIB,
        "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 2**16 - 1, "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(chip.bandwidth), "device_memory_size": int(chip.memory), "l2_cache_size": int(gpu.cache * MIB),
    }  # fmt: skip
    lines = [f"{name}: {value}" for name, value in about.items()]
    lines.append(f"cuda_compute_capability {{ major: {major} minor: {minor} }}")
    return "\n".join([
        f"gpu_device_info {{ {' '.join(lines)} }}",
        'platform_name: "CUDA"',
        f"dnn_version_info {{ major: {DNN[0]} minor: {DNN[1]} }}",
        f"runtime_version {{ major: {RUNTIME[0]} minor: {RUNTIME[1]} }}",
        f'device_description_str: "{gpu.name}"',
    ])  # fmt: skip


def gpu_devices(name: str, kind: str, count: int) -> Sequence[Any] | None:
    """Devices to compile for; None where the compiler is not installed.

    Args:
        name: of the topology, for errors.
        kind: a key of ``KINDS``.
        count: GPUs of one machine.

    Raises:
        InputError: the compiler is there and does not take them.
    """
    if not importlib.util.find_spec("jax_cuda13_plugin"):
        return None
    from jax.experimental import topologies

    # It looks for a driver, and for the versions of CUDA's libraries on this machine, of which nothing will be run.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        return topologies.get_topology_desc(platform="cuda", target_config=target_config(kind), topology=f"1x1x{count}").devices
    except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise InputError(f"--topology={name}: {str(error).strip().splitlines()[0]}") from error
