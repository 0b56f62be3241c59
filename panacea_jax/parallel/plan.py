"""What a training step will need on machines that one does not have: the command ``plan``.

For a TPU topology the real step is compiled for it, without a TPU: the compiler's own figures say what one chip must hold. For GPUs,
which cannot be compiled for from afar, a memory model answers, the same that ``--search`` sorts candidates with. Times are a roofline,
the least that the data sheets allow, not a measurement.
"""

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from panacea_jax.defences.loss import num_chunks
from panacea_jax.errors import InputError
from panacea_jax.models.config import ModelConfig
from panacea_jax.models.decoder import REMAT
from panacea_jax.models.hub import local_folder
from panacea_jax.models.model import abstract
from panacea_jax.parallel import cost_model
from panacea_jax.parallel.abstract_step import Step, abstract_step, resident
from panacea_jax.parallel.hlo import collectives
from panacea_jax.parallel.mesh import make_mesh, stand_ins
from panacea_jax.parallel.sharding import weight_sharding
from panacea_jax.parallel.topology import Chip, Topology, topology
from panacea_jax.progress import Progress
from panacea_jax.train.step import make_step
from panacea_jax.workdir import write_text

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
        refused: what the compiler said of a program that is too large for a device; "" if it compiled, or was not asked.
    """

    topology: str
    mesh: dict[str, int]
    batch_size: int
    rows: int
    remat: str
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
    refused: str = ""

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


def plan(
    config: ConfigDict, name: str, search: bool = False, workdir: Path | None = None
) -> list[Plan]:
    """Plan the fine-tuning step of a configuration for a topology and print the outcome.

    Args:
        config: validated configuration; of its model only ``config.json`` is read.
        name: see :func:`panacea_jax.parallel.topology.topology`.
        search: try every mesh, batch sizes ×1, ×2, ×4 and remat policy; the cheapest by device seconds a record that fits comes first.
        workdir: where ``plan.json`` goes; None writes none.

    Raises:
        InputError: the topology, the model or a mesh that does not divide the devices; nothing that fits, after the table.
    """
    if not config.model.path:
        raise InputError(
            "config.model.path is not set: give a folder with config.json, or a hub id"
        )
    machine = topology(name)
    model = ModelConfig.from_folder(local_folder(config.model.path, ["config.json"]))
    chosen = _search(config, model, machine) if search else [_plan(config, model, machine)]
    report(chosen)
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        records = [
            dataclasses.asdict(p)
            | {"total": p.total, "fits": p.fits, "step_seconds": p.step_seconds}
            for p in chosen
        ]
        write_text(workdir / "plan.json", json.dumps(records, indent=1) + "\n")
    best = chosen[0]
    if not best.fits:
        needed = best.refused or f"{_gib(best.total)} of {_gib(best.limit)} a device needed"
        raise InputError(
            f"--topology={name}: {needed}; use more chips, a larger mesh.fsdp or .tensor, model.remat=full, a smaller batch or "
            "max_length, or --search"
        )
    return chosen


# ---- one plan


def _plan(config: ConfigDict, model: ModelConfig, machine: Topology, compiled: bool = True) -> Plan:
    devices = stand_ins(machine.size) if machine.devices is None else machine.devices
    mesh = make_mesh(**config.mesh, devices=devices)
    chip = machine.chip
    step = abstract_step(config, model, mesh, None if machine.devices else chip)
    kept, modelled = resident(step), cost_model.temporary(step)
    temporary, arguments, seconds, refused = sum(modelled.values()), None, None, ""
    flops, sent, between = (
        cost_model.flops(step),
        cost_model.sent(step),
        cost_model.sent_between(step),
    )
    if compiled and machine.devices is not None:
        start = time.perf_counter()
        try:
            executable = _compile(step)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refused = _too_large(str(error))
        else:
            memory = executable.memory_analysis()
            # The start of training is kept by the loop, not by the step.
            arguments = memory.argument_size_in_bytes + kept.get("start of training", 0)
            temporary = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
            temporary += memory.output_size_in_bytes - memory.alias_size_in_bytes
            chunks = num_chunks(config.data.max_length - 1)
            try:
                found = collectives(executable.as_text(), model.num_layers, mesh.size, chunks)
                sent = float(sum(c.sent for c in found))
            except jax.errors.JaxRuntimeError:  # libtpu compiles what this jaxlib cannot print
                logging.warning("%s: the program cannot be read; sent is the model's", machine.name)
        seconds = time.perf_counter() - start
    times = {
        "compute": flops / (chip.flops / chip.devices),
        "memory": cost_model.weights_read(step) / (chip.bandwidth / chip.devices),
        "links": sent / (chip.links / chip.devices),
    }
    if between:
        times["network"] = between / (chip.network / chip.devices)
    return Plan(
        machine.name, dict(mesh.shape), config.train.batch_size, step.batches["user"].tokens.shape[0], step.remat,
        kept, arguments, temporary, modelled, _usable(chip) / chip.devices, flops, sent, between, times, seconds, refused,
    )  # fmt: skip


def _compile(step: Step) -> Any:
    program = make_step(step.model, step.defence, step.optimizer, step.shardings)
    return program.lower(step.state, step.weights, step.batches, step.key).compile()  # type: ignore[attr-defined]


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
            bar.advance(_title(found[-1]))
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
        for path, shape in abstract(model)[1].items():
            weight_sharding(mesh, path, shape)
    except InputError:
        return False
    return True


# ---- the table


def report(plans: list[Plan]) -> None:
    """Print plans side by side, the first being the one to take."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=40 + 30 * len(plans))
    table = Table(title=f"{plans[0].topology}: one device, one step", title_justify="left")
    table.add_column("", no_wrap=True)
    for p in plans:
        table.add_column(_title(p), justify="right")
    for kind in plans[0].resident:
        table.add_row(kind, *(_gib(p.resident[kind]) for p in plans))
    table.add_row("temporary", *(_gib(p.temporary) for p in plans))
    table.add_row("  by the model", *(_gib(sum(p.modelled.values())) for p in plans))
    for kind in plans[0].modelled:
        table.add_row(f"    {kind}", *(_gib(p.modelled[kind]) for p in plans))
    table.add_row("together", *(_gib(p.total) for p in plans))
    table.add_row("there is", *(_gib(p.limit) for p in plans))
    table.add_row("fits", *("yes" if p.fits else "NO" for p in plans))
    if any(p.refused for p in plans):
        table.add_row("the compiler", *(p.refused for p in plans))
    table.add_row("TFLOP", *(f"{p.flops / 1e12:.2f}" for p in plans))
    table.add_row("sent", *(_gib(p.sent) for p in plans))
    if any(p.sent_between for p in plans):
        table.add_row("  between slices", *(_gib(p.sent_between) for p in plans))
    for bound in plans[0].seconds:
        table.add_row(f"{bound}, at least", *(f"{p.seconds[bound] * 1e3:.1f} ms" for p in plans))
    table.add_row("step, at least", *(f"{p.step_seconds * 1e3:.1f} ms" for p in plans))
    table.add_row("device s a record", *(f"{p.cost:.4f}" for p in plans))
    console.print(table)
    console.print(
        "Memory: "
        + (
            "the compiler's."
            if plans[0].arguments is not None
            else "a model, not a compiler's figure."
        )
        + " Times: the least that the data sheets allow, if all overlaps; nothing was run.",
        highlight=False,
    )


def _title(p: Plan) -> str:
    shape = "×".join(str(n) for axis, n in p.mesh.items() if axis != "replica" or n > 1)
    return f"{shape}, {p.batch_size} records, remat {p.remat}"


def _gib(n: float | int) -> str:
    return f"{n / 2**30:,.2f} GiB"
