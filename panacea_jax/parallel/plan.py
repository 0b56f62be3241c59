"""What a training step will need on machines that one does not have: the command ``plan``.

For a TPU topology the real step is compiled for it, without a TPU: the compiler's own figures say what one chip must hold. For GPUs,
which cannot be compiled for from afar, a memory model answers, the same that ``--search`` sorts candidates with. Times are a roofline,
the least that the data sheets allow, not a measurement.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from panacea_jax.config import make_defence
from panacea_jax.data.batches import Batch
from panacea_jax.defences import Defence
from panacea_jax.defences.loss import CHUNK
from panacea_jax.defences.protocol import passes_of
from panacea_jax.errors import InputError
from panacea_jax.models import lora, quantise
from panacea_jax.models.config import ModelConfig
from panacea_jax.models.fused import choose
from panacea_jax.models.hub import local_folder
from panacea_jax.models.model import Model, abstract
from panacea_jax.parallel.hlo import collectives
from panacea_jax.parallel.mesh import make_mesh, slices_of, stand_ins
from panacea_jax.parallel.sharding import (
    adapter_shardings,
    batch_rows,
    batch_sharding,
    bytes_per_device,
    replicated,
    weight_sharding,
)
from panacea_jax.parallel.topology import Chip, Topology, topology
from panacea_jax.progress import Progress
from panacea_jax.train.optimizer import optimizer_of
from panacea_jax.train.stage import batch_sizes
from panacea_jax.train.step import TrainState, make_step, state_shardings
from panacea_jax.workdir import write_text

# Candidates of a search that are compiled, best first by the model.
COMPILED = 3


class Step(NamedTuple):
    """The arguments of a training step as shapes with shardings, and what they belong to."""

    model: Model
    defence: Defence
    optimizer: Any
    shardings: Any
    state: TrainState
    weights: Any
    batches: dict[str, Batch]
    key: Any
    attention: str


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
        modelled_temporary: the model's figure.
        limit: bytes of one device.
        flops: floating-point operations of one device a step, recomputation included.
        sent: bytes that one device sends a step over the links within a slice.
        sent_between: the same over the network between slices, by the model.
        seconds: least time of a step by what bounds it: compute, memory, links, network.
        compile_seconds: time to compile; None without a compiler.
    """

    topology: str
    mesh: dict[str, int]
    batch_size: int
    rows: int
    remat: str
    resident: dict[str, int]
    arguments: int | None
    temporary: int
    modelled_temporary: int
    limit: float
    flops: float
    sent: float
    sent_between: float
    seconds: dict[str, float]
    compile_seconds: float | None

    @property
    def total(self) -> int:
        """Bytes of one device."""
        return (
            sum(self.resident.values()) if self.arguments is None else self.arguments
        ) + self.temporary

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.total <= self.limit

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
    if not chosen[0].fits:
        raise InputError(
            f"--topology={name}: {_gib(chosen[0].total)} of {_gib(chosen[0].limit)} a device needed; "
            "use more chips, a larger mesh.fsdp or .tensor, model.remat=full, a smaller batch or max_length, or --search"
        )
    return chosen


# ---- one plan


def abstract_step(
    config: ConfigDict, model: ModelConfig, mesh: Mesh, target: Chip | None = None
) -> Step:
    """The arguments of the fine-tuning step for the longest batch, nothing allocated.

    Args:
        config: validated configuration.
        model: shapes of the base.
        mesh: devices, there or not.
        target: the GPU whose place the mesh's devices take.

    Raises:
        InputError: a defence without steps, or an attention back-end that the devices do not have.
    """
    full = config.train.full_parameters
    c = config.model
    graphdef, shapes = abstract(model, c.dtype, c.remat, c.attention)
    static = Model(model, graphdef, None, jnp.dtype(config.model.dtype), mesh)
    base = unflatten_dict(abstract_weights(config, shapes, mesh), sep="/")
    params = base if full else fresh_adapter(static, config)
    defence = make_defence(config.defence)
    if not isinstance(defence, Defence):
        raise InputError(
            f"config.defence.name = {config.defence.name}: acts in one shot; there is no step to plan"
        )
    optimizer = optimizer_of(config.optimizer, config.optimizer.learning_rate, defence)

    def build(params: Any) -> TrainState:
        step = jnp.zeros((), jnp.int32)
        return TrainState(params, optimizer.init(params), defence.init(params), step)

    state = jax.eval_shape(build, params)
    shardings = state_shardings(state, params)
    state = placed(state, shardings)
    parts, length = batch_rows(mesh), config.data.max_length

    def batch(size: int) -> Batch:
        rows = -(-size // parts) * parts
        segments = (jnp.int32,) if config.data.packing else ()
        kinds = (jnp.int32, jnp.bool_, jnp.bool_, *segments)
        return Batch(*(_like((rows, length), kind, batch_sharding(mesh)) for kind in kinds))

    batches = {name: batch(size) for name, size in stream_sizes(config, defence).items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = _like(key.shape, key.dtype, replicated(mesh))
    weights = None if full else base
    backend = choose(c.attention, model, c.dtype, target or mesh.devices.flat[0]).name
    return Step(static, defence, optimizer, shardings, state, weights, batches, key, backend)


def stream_sizes(config: ConfigDict, defence: Defence) -> dict[str, int]:
    """Records a step of the user's stream and of those that the defence asks for."""
    sizes, repeats = batch_sizes(config.train), getattr(defence, "repeats", {})
    return {name: sizes[name] * repeats.get(name, 1) for name in ("user", *defence.streams)}


def abstract_weights(
    config: ConfigDict, shapes: Mapping[str, tuple[int, ...]], mesh: Mesh
) -> dict[str, Any]:
    """All weights by path, as they are kept: float32 where they are trained, the projections in few bits if so configured."""
    kept = jnp.dtype("float32" if config.train.full_parameters else config.model.dtype)
    bits = config.model.quantization
    return {
        path: quantise.abstract(mesh, path, shape, bits) if bits and quantise.is_quantised(path)
        else _like(shape, kept, weight_sharding(mesh, path, shape))
        for path, shape in shapes.items()
    }  # fmt: skip


def fresh_adapter(model: Model, config: ConfigDict) -> Any:
    """The shapes of a fresh adapter on the mesh."""
    o = config.lora
    made = jax.eval_shape(
        lambda key: lora.init(model, o.rank, o.alpha, o.targets, key=key), jax.random.key(0)
    )
    places = adapter_shardings(model.mesh, made.layers)
    return dataclasses.replace(made, layers=placed(made.layers, places))


def placed(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with the places of another."""
    return jax.tree.map(lambda x, s: _like(x.shape, x.dtype, s), shapes, shardings)


def _like(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def resident(step: Step) -> dict[str, int]:
    """Bytes of one device by kind, of what stays between steps."""
    state = step.state
    kinds = {
        "trained weights": state.params,
        "optimizer": state.opt_state,
        "defence": state.defence,
    }
    if step.weights is not None:
        kinds = {"base weights": step.weights, **kinds, "start of training": state.params}
    return {kind: tree_bytes(tree) for kind, tree in kinds.items()}


def tree_bytes(tree: Any) -> int:
    """Bytes of one device's shards."""
    return sum(
        bytes_per_device(x.sharding, tuple(x.shape), x.dtype.itemsize)
        for x in jax.tree.leaves(tree)
    )


def _plan(config: ConfigDict, model: ModelConfig, machine: Topology, compiled: bool = True) -> Plan:
    devices = stand_ins(machine.size) if machine.devices is None else machine.devices
    mesh = make_mesh(**config.mesh, devices=devices)
    step = abstract_step(config, model, mesh, None if machine.devices else machine.chip)
    kept = resident(step)
    modelled = modelled_temporary(step, config.model.remat)
    temporary, arguments, seconds = modelled, None, None
    flops, sent = modelled_flops(step, config.model.remat), modelled_sent(step, config.model.remat)
    between = modelled_between(step)
    if compiled and machine.devices is not None:
        start = time.perf_counter()
        program = make_step(step.model, step.defence, step.optimizer, step.shardings)
        executable = program.lower(step.state, step.weights, step.batches, step.key).compile()  # type: ignore[attr-defined]
        seconds = time.perf_counter() - start
        memory = executable.memory_analysis()
        # The start of training is kept by the loop, not by the step.
        arguments = memory.argument_size_in_bytes + kept.get("start of training", 0)
        temporary = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        temporary += memory.output_size_in_bytes - memory.alias_size_in_bytes
        try:
            found = collectives(executable.as_text(), model.num_layers, mesh.size)
            sent = sum(c.sent for c in found)
        except jax.errors.JaxRuntimeError:  # libtpu compiles what this jaxlib cannot print
            logging.warning("%s: the program cannot be read; sent is the model's", machine.name)
    chip = machine.chip
    tensor, full = mesh.shape["tensor"], config.train.full_parameters
    # Each pass reads the gathered weights once forward, once backward, and once more where the forward pass is repeated.
    reads = _passes(step) * _turns(config.model.remat) * model.num_parameters() / tensor
    width = jnp.dtype("float32" if full else step.model.dtype).itemsize
    times = {
        "compute": flops / (chip.flops / chip.devices),
        "memory": reads * width / (chip.bandwidth / chip.devices),
        "links": sent / (chip.links / chip.devices),
    }
    if between:
        times["network"] = between / (chip.network / chip.devices)
    return Plan(
        machine.name, dict(mesh.shape), config.train.batch_size, step.batches["user"].tokens.shape[0], config.model.remat,
        kept, arguments, temporary, modelled, chip.memory / chip.devices, flops, sent, between, times, seconds,
    )  # fmt: skip


# ---- the model


def _turns(remat: str) -> int:
    """Times that a pass goes through the layers' weights: forward, backward, and forward again."""
    return 3 if remat == "full" else 2


def _passes_of(defence: Defence) -> dict[str, float]:
    """By stream, in batches as the step receives them."""
    repeats = getattr(defence, "repeats", {})
    return {name: n / repeats.get(name, 1) for name, n in passes_of(defence).items()}


def _passes(step: Step) -> float:
    return sum(_passes_of(step.defence).values())


def modelled_flops(step: Step, remat: str) -> float:
    """Floating-point operations of one device a step, padding and recomputation included."""
    full = step.weights is None
    turns = _turns(remat) + full  # the gradient by the weights is one more matrix product each
    total = 0.0
    for name, passes in _passes_of(step.defence).items():
        rows, length = step.batches[name].tokens.shape
        total += passes * rows * length * step.model.config.flops_per_token(length) * turns
    return total / step.model.mesh.size


def modelled_sent(step: Step, remat: str) -> float:
    """Bytes that one device sends a step within its slice.

    Weights are gathered over ``fsdp``, activations summed over ``tensor``, gradients summed over all rows. A ring over n devices
    sends (n − 1)/n of what is gathered, and twice that of what is summed.
    """
    c, mesh, width = step.model.config, step.model.mesh, step.model.dtype.itemsize
    full = step.weights is None
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    copies = batch_rows(mesh) // fsdp // slices_of(mesh.devices.flat)
    layers = (c.matmul_parameters() - c.hidden_size * c.vocab_size) * width / tensor
    head = c.hidden_size * c.vocab_size * width / tensor
    # A gathered layer is used and dropped; the backward pass gathers it again, once for both of its turns. The head is kept.
    gathered = (_passes(step) * 2 * layers + head) * (fsdp - 1) / fsdp
    summed, reduced = 0.0, 0.0
    for name, passes in _passes_of(step.defence).items():
        rows, length = step.batches[name].tokens.shape
        stream = rows / batch_rows(mesh) * length * c.hidden_size * width
        # Two sums a layer forward (attention and MLP), two backward, and two in a repeated forward pass.
        summed += passes * 2 * _turns(remat) * c.num_layers * stream * 2 * (tensor - 1) / tensor
        for x in jax.tree.leaves(step.state.params):
            share = tree_bytes(x) * width / 4  # gradients are summed in the compute dtype
            parts = copies * fsdp
            if "fsdp" in x.sharding.spec:
                # Summed and scattered over fsdp, which is a gather backwards; an adapter's float32 is gathered forward and backward too.
                gathers = 0 if full else 2 * 4 / width
                reduced += passes * (1 + gathers) * share * (fsdp - 1)
                parts = copies
            reduced += passes * share * 2 * (parts - 1) / parts
    return gathered + summed + reduced


def modelled_between(step: Step) -> float:
    """Bytes that one device sends a step to other slices: of the gradients, which its slice has summed and shared out before."""
    mesh = step.model.mesh
    slices = slices_of(mesh.devices.flat)
    whole = sum(x.size for x in jax.tree.leaves(step.state.params)) * step.model.dtype.itemsize
    return _passes(step) * whole / (mesh.size / slices) * 2 * (slices - 1) / slices


def modelled_temporary(step: Step, remat: str) -> int:
    """Bytes of one device that come and go in a step.

    The largest pass counts: the residual stream of each layer, which the backward pass starts from; what one layer (of all, without
    remat) keeps of attention and MLP; a chunk of logits and their gradient in float32. Then a layer's gathered (or, from
    few bits, brought back) weights, the head's if gathered, and gradients.
    """
    c, mesh, width = step.model.config, step.model.mesh, step.model.dtype.itemsize
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    largest = 0.0
    for batch in step.batches.values():
        rows, length = batch.tokens.shape
        tokens = rows / batch_rows(mesh) * length
        heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        stream = tokens * c.hidden_size * width
        # A fused kernel holds no scores.
        plain = step.attention == "xla"
        scores = tokens * length * c.num_heads / tensor * (4 + width) * plain
        inside = tokens * (2 * heads + 2 * kv + 3 * c.intermediate_size) / tensor * width
        inside += 4 * stream + scores
        kept = inside if remat == "full" else c.num_layers * (inside - scores * (remat == "dots"))
        chunk = tokens * min(1, CHUNK / length)
        logits = chunk * c.vocab_size / tensor * (2 * 4 + width)
        largest = max(largest, c.num_layers * stream + kept + logits)
    per_layer = (c.matmul_parameters() - c.hidden_size * c.vocab_size) / c.num_layers
    few_bits = any(x.dtype.itemsize == 1 for x in jax.tree.leaves(step.weights))
    # Trained weights travel in float32, the dtype they are kept in; those in few bits come back through two float32 arrays.
    travel = 4 if step.weights is None else width
    gathered = (per_layer + c.hidden_size * c.vocab_size) * travel / tensor * (fsdp > 1)
    if few_bits:
        gathered += per_layer * (4 + 4 + (fsdp == 1) * width) / tensor
    gradients = 2 if _passes(step) > 1 else 1
    return int(largest + gathered + gradients * tree_bytes(step.state.params))


# ---- search


def _search(config: ConfigDict, model: ModelConfig, machine: Topology) -> list[Plan]:
    """Plans, the cheapest that fits first: all by the model, the best few compiled."""
    candidates = list(_candidates(config, model, machine))
    modelled = [(_plan(c, model, machine, compiled=False), c) for c in candidates]
    modelled.sort(key=lambda pair: (not pair[0].fits, pair[0].cost))
    if machine.devices is None:
        return [p for p, _ in modelled[: 2 * COMPILED]]
    found = []
    with Progress("compile", min(COMPILED, len(modelled))) as bar:
        for _, candidate in modelled[:COMPILED]:
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
            for remat in ("none", "dots", "full"):
                for factor in (1, 2, 4):
                    tried = config.copy_and_resolve_references()
                    with tried.unlocked():
                        tried.mesh.replica = 0
                        tried.mesh.data, tried.mesh.fsdp = n // tensor // fsdp, fsdp
                        tried.mesh.tensor, tried.model.remat = tensor, remat
                        tried.train.batch_size *= factor
                        tried.train.harmful_batch_size *= factor
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
        console = Console(width=120)
    table = Table(title=f"{plans[0].topology}: one device, one step", title_justify="left")
    table.add_column("")
    for p in plans:
        table.add_column(_title(p), justify="right")
    for kind in plans[0].resident:
        table.add_row(kind, *(_gib(p.resident[kind]) for p in plans))
    table.add_row("temporary", *(_gib(p.temporary) for p in plans))
    table.add_row("  by the model", *(_gib(p.modelled_temporary) for p in plans))
    table.add_row("together", *(_gib(p.total) for p in plans))
    table.add_row("there is", *(_gib(p.limit) for p in plans))
    table.add_row("fits", *("yes" if p.fits else "NO" for p in plans))
    table.add_row("TFLOP", *(f"{p.flops / 1e12:.2f}" for p in plans))
    table.add_row("sent", *(_gib(p.sent) for p in plans))
    if any(p.sent_between for p in plans):
        table.add_row("  between slices", *(_gib(p.sent_between) for p in plans))
    for bound in plans[0].seconds:
        table.add_row(f"{bound}, at least", *(f"{p.seconds[bound] * 1e3:.1f} ms" for p in plans))
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
