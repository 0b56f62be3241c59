"""What a training step will need on machines that one does not have.

For a TPU topology the real step is compiled for it, without a TPU: the compiler's own figures say what one chip must hold. For GPUs
likewise, where XLA's compiler for them is installed; else a memory model answers, the same that ``--search`` sorts candidates with.
Times are a roofline, the least that the data sheets allow, not a measurement.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from panacea_jax.errors import InputError
from panacea_jax.models.config import ModelConfig
from panacea_jax.models.decoder import REMAT
from panacea_jax.models.families import config_from_folder
from panacea_jax.models.hub import local_folder
from panacea_jax.models.model import abstract_model
from panacea_jax.parallel.chips import Chip
from panacea_jax.parallel.mesh import make_mesh, stand_ins
from panacea_jax.parallel.sharding import weight_sharding
from panacea_jax.planning import cost_model
from panacea_jax.planning.abstract_step import AbstractStep, abstract_step, resident
from panacea_jax.planning.explain import Explained, explain
from panacea_jax.planning.gpu_target import COMPILER_OPTIONS
from panacea_jax.planning.hlo import custom_calls, operations
from panacea_jax.planning.topology import Topology
from panacea_jax.progress import Progress
from panacea_jax.train.step import make_step

# Candidates of a search that are compiled, best first by the model; more while none of them fits.
COMPILED = 3
# Of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says another share.
GPU_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device needs for a step.

    Attributes:
        topology: as asked for.
        mesh: devices by axis.
        batch_size: records of the user's a step, without padding rows.
        rows: rows of the user's batch, with them.
        remat: see ``config.model.remat``.
        attention: its back-end.
        attention_why: why that.
        resident: bytes by kind of what stays between steps, from shapes and shardings.
        arguments: the same, together with the batches, as the compiler lays it out; None without a compiler.
        temporary: bytes that come and go in a step: the compiler's figure, or the model's.
        modelled: the model's figure by kind; the compiler's cannot be told apart.
        limit: bytes of one device.
        flops: floating-point operations of one device a step, recomputation included.
        sent: bytes that one device sends a step over the links within a slice.
        sent_between: the same over the network between slices, by the model.
        seconds: least time of a step by what bounds it: compute, memory, links, network.
        compile_seconds: time to compile; None without a compiler.
        calls: of a compiled program, how often it calls which kernel that is no part of it (cuDNN's, cuBLAS', Pallas'), in its text.
        explained: where the least time of a compiled program goes.
        refused: what the compiler said of a program that is too large for a device; "" if it compiled, or was not asked.
    """

    topology: str
    mesh: dict[str, int]
    batch_size: int
    rows: int
    remat: str
    attention: str
    attention_why: str
    resident: dict[str, int]
    arguments: int | None
    temporary: int
    modelled: dict[str, int]
    limit: float
    flops: float
    sent: float
    sent_between: float
    seconds: dict[str, float]
    compile_seconds: float | None
    calls: dict[str, int]
    explained: Explained | None
    refused: str = ""

    @property
    def title(self) -> str:
        """Mesh, records and remat policy in a few words."""
        shape = "×".join(str(n) for axis, n in self.mesh.items() if axis != "replica" or n > 1)
        return f"{shape}, {self.batch_size} records, remat {self.remat}"

    @property
    def total(self) -> int:
        """Bytes of one device."""
        return (
            sum(self.resident.values()) if self.arguments is None else self.arguments
        ) + self.temporary

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return not self.refused and self.total <= self.limit

    @property
    def step_seconds(self) -> float:
        """The largest of ``seconds``: what bounds the step if all else overlaps."""
        return max(self.seconds.values())

    @property
    def cost(self) -> float:
        """Device seconds for one record."""
        return self.step_seconds * math.prod(self.mesh.values()) / self.batch_size


def plans_for(config: ConfigDict, machine: Topology, search: bool = False) -> list[Plan]:
    """Plans of the fine-tuning step of a configuration on a machine, the one to take first.

    Args:
        config: validated configuration; of its model only ``config.json`` is read.
        machine: see :func:`panacea_jax.planning.topology.topology`.
        search: try every mesh, batch sizes ×1, ×2, ×4 and remat policy; the cheapest by device seconds a record that fits comes first.

    Raises:
        InputError: the model, or a mesh that does not divide the devices.
    """
    model = config_from_folder(local_folder(config.model.path, ["config.json"]))
    return _search(config, model, machine) if search else [_plan(config, model, machine)]


# ---- one plan


def _plan(config: ConfigDict, model: ModelConfig, machine: Topology, compiled: bool = True) -> Plan:
    devices = stand_ins(machine.size) if machine.devices is None else machine.devices
    mesh = make_mesh(**config.mesh, devices=devices)
    chip = machine.chip
    step = abstract_step(config, model, mesh, chip if chip.platform == "gpu" else None)
    kept, modelled = resident(step.state, step.weights), cost_model.temporary(step)
    temporary, arguments, refused = sum(modelled.values()), None, ""
    sent, taken, calls, explained = cost_model.sent(step), None, {}, None
    if compiled and machine.devices is not None:
        start = time.perf_counter()
        try:
            executable = _compile(step, COMPILER_OPTIONS if chip.platform == "gpu" else {})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refused = _too_large(str(error))
        except NotImplementedError as error:  # jax asks the GPUs of this machine whether cuDNN takes heads of more than 128
            logging.warning("%s: cannot be compiled here (%s); memory is the model's", machine.name, error)
        else:
            memory = executable.memory_analysis()
            # The start of training is kept by the loop, not by the step.
            arguments = memory.argument_size_in_bytes + kept.get("start of training", 0)
            temporary = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
            temporary += memory.output_size_in_bytes - memory.alias_size_in_bytes
            try:
                text = executable.as_text()
                found = operations(text, mesh.size)
                sent, calls, explained = sum((o.sent for o in found), 0.0), custom_calls(text), explain(found, chip)
            except jax.errors.JaxRuntimeError:  # libtpu compiles what this jaxlib cannot print
                logging.warning("%s: the program cannot be read; sent is the model's", machine.name)
        taken = time.perf_counter() - start
    return Plan(
        machine.name, dict(mesh.shape), config.train.batch_size, step.batches["user"].tokens.shape[0], step.remat,
        *step.attention, kept, arguments, temporary, modelled, _usable(chip) / chip.devices,
        cost_model.flops(step), sent, cost_model.sent_between(step), cost_model.seconds(step, chip, sent), taken, calls, explained, refused,
    )  # fmt: skip


def _compile(step: AbstractStep, options: Mapping[str, int | bool]) -> Any:
    program = make_step(step.model, step.defence, step.optimizer, step.shardings, step.accumulate)
    lowered = program.lower(step.state, step.weights, step.batches, step.key)  # type: ignore[attr-defined]
    return lowered.compile(options)


def _too_large(message: str) -> str:
    """What the compiler says of a program that does not fit, in its own figures where it gives them."""
    found = re.search(r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", message)
    if found:
        return f"temporaries of {found[1]} and {found[2]} of memory"
    return message.splitlines()[0]


def _usable(chip: Chip) -> float:
    """Bytes of a chip that JAX takes: all of a TPU's, of a GPU's a share."""
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_SHARE))
    return chip.memory * (share if chip.platform == "gpu" else 1.0)


# ---- search


def _search(config: ConfigDict, model: ModelConfig, machine: Topology) -> list[Plan]:
    """Plans, the cheapest that fits first: all by the model, the best few compiled."""
    candidates = list(_candidates(config, model, machine))
    modelled = [(_plan(c, model, machine, compiled=False), c) for c in candidates]
    modelled.sort(key=lambda pair: (not pair[0].fits, pair[0].cost))
    if machine.devices is None:
        return [p for p, _ in modelled[: 2 * COMPILED]]
    found: list[Plan] = []
    with Progress("compile", min(COMPILED, len(modelled))) as bar:
        for _, candidate in modelled:
            if len(found) >= COMPILED and any(p.fits for p in found):
                break
            found.append(_plan(candidate, model, machine))
            bar.advance(found[-1].title)
    return sorted(found, key=lambda p: (not p.fits, p.cost))


def _candidates(config: ConfigDict, model: ModelConfig, machine: Topology) -> Iterator[ConfigDict]:
    n = machine.size // machine.slices
    divisors = [k for k in range(1, n + 1) if n % k == 0]
    for tensor in divisors:
        if model.num_heads % tensor or model.num_kv_heads % tensor:
            continue
        for fsdp in (k for k in divisors if (n // tensor) % k == 0):
            if not _divide(model, fsdp, tensor):
                continue
            for remat in REMAT:
                for factor in (1, 2, 4):
                    tried = config.copy_and_resolve_references()
                    with tried.unlocked():
                        tried.mesh.replica = 0
                        tried.mesh.data, tried.mesh.fsdp = n // tensor // fsdp, fsdp
                        tried.mesh.tensor, tried.model.remat = tensor, remat
                        for size in ("batch_size", "harmful_batch_size", "alignment_batch_size"):
                            tried.train[size] *= factor
                    yield tried


def _divide(model: ModelConfig, fsdp: int, tensor: int) -> bool:
    """Whether the axes divide every weight."""
    mesh = make_mesh(1, fsdp, tensor, stand_ins(fsdp * tensor))
    try:
        for path, shape in abstract_model(model)[1].items():
            weight_sharding(mesh, path, shape)
    except InputError:
        return False
    return True
