"""The command ``doctor``: what this machine has, what a configuration will use of it, and whether
its files can be used.

Nothing is downloaded or trained. Of the base only file headers are read; the adapter of
``config.lora.init_from`` is read whole, as a run would place it.
"""

import contextlib
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from panacea_jax.config import make_defence
from panacea_jax.data import files
from panacea_jax.data.encode import check_ids, encode, encode_prompt
from panacea_jax.data.sources import Record, layout_of, load_records
from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges import make_judge, needs_model
from panacea_jax.models import lora
from panacea_jax.models.config import ModelConfig, read_config
from panacea_jax.models.families import config_from_folder
from panacea_jax.models.fused import choose_backend
from panacea_jax.models.head import as_found
from panacea_jax.models.model import Model, abstract_model
from panacea_jax.models.vocabulary import Vocabulary, open_vocabulary
from panacea_jax.models.weights import find_tensors
from panacea_jax.parallel import make_mesh, weight_sharding
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.planning.abstract_step import abstract_weights, fresh_adapter, placed, tree_bytes
from panacea_jax.stages.rendering import make_template
from panacea_jax.stages.streams import defender_records, is_local, training_records, user_records
from panacea_jax.train.optimizer import optimizer_of
from panacea_jax.train.step import state_shardings
from panacea_jax.workdir import versions

STREAMS = ("user", "attack", "harmful", "alignment", "benign")
PLAIN_WIDTH = 160  # columns, where there is no terminal to ask
NOT_LOOKED_AT = "hub id; not looked at"

Bytes = list[tuple[str, int]]


def doctor(config: ConfigDict) -> None:
    """Print what there is and what will be used; complain once all of it is printed.

    Args:
        config: validated configuration; everything about a model is left out when
            ``config.model.path`` is not set.

    Raises:
        InputError: the first problem that was found, after the tables.
    """
    report = _Report()
    _versions(report)
    devices = _devices(report)
    mesh = _mesh(report, config, devices) if devices else None
    model = _model(report, config)
    _attention(report, config, model)
    if model is not None and mesh is not None:
        graphdef, shapes = abstract_model(model, config.model.dtype, config.model.remat)
        static = Model(model, graphdef, None, jnp.dtype(config.model.dtype), mesh)
        with report.noting():
            _sharding(report, config, mesh, shapes)
            adapter = None
            if not config.train.full_parameters:
                adapter = _adapter(static, config)
                _adapter_sharding(report, adapter)
            _memory(report, static, config, shapes, adapter)
    vocabulary = _tokenizer(report, config)
    _judge(report, config)
    _sources(report, config, vocabulary)
    report.end()


class _Report:
    """Tables on stdout, and the problems in the order in which they were found."""

    def __init__(self) -> None:
        terminal = sys.stdout.isatty()
        self._console = Console(
            width=None if terminal else PLAIN_WIDTH, markup=False, highlight=False, emoji=False
        )
        self._box = box.SIMPLE_HEAD if terminal else None
        self.problems: list[str] = []

    def table(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print one table; numbers (a head that begins with "#") are set to the right."""
        table = Table(box=self._box, pad_edge=False, show_header=any(heads))
        for head in heads:
            right = head.startswith("#")
            table.add_column(
                head.removeprefix("#"), justify="right" if right else "left", overflow="fold"
            )
        for row in rows:
            table.add_row(*row)
        self._console.print(f"\n{title}", style="bold")
        self._console.print(table)

    def line(self, text: str) -> None:
        """Print one line."""
        self._console.print(text)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Keep an InputError of the block for the end, and go on after it."""
        try:
            yield
        except InputError as error:
            if str(error) not in self.problems:  # one cause may show in several tables
                self.problems.append(str(error))

    def end(self) -> None:
        """Raise the first problem, if there is any."""
        if not self.problems:
            self.line("\nno problem found")
            return
        self.table("problems", ("",), [(problem,) for problem in self.problems])
        raise InputError(self.problems[0])


# ---- machine


def _versions(report: _Report) -> None:
    rows = [
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *versions().items(),
    ]
    report.table("versions", ("", ""), rows)


def _devices(report: _Report) -> list[jax.Device]:
    """Every device of every process; empty when JAX finds none."""
    try:
        devices = jax.devices()
    except (
        RuntimeError
    ) as error:  # JAX_PLATFORMS names a back-end whose plugin or driver is missing
        report.problems.append(f"JAX finds no device: {str(error).splitlines()[0]}")
        return []
    kinds: dict[tuple[str, str], list[jax.Device]] = {}
    for device in devices:
        kinds.setdefault((device.platform, device.device_kind), []).append(device)
    rows = [
        (place, kind, str(len(found)), _gib(_capacity(found[0])))
        for (place, kind), found in kinds.items()
    ]
    title = f"devices ({jax.process_count()} process{'es' * (jax.process_count() > 1)})"
    report.table(title, ("platform", "kind", "#count", "#memory each"), rows)
    return list(devices)


def _capacity(device: jax.Device) -> int | None:
    """Bytes that JAX may use on a device; None where the back-end does not say (CPU)."""
    local = device.process_index == jax.process_index()
    stats = device.memory_stats() if local else None
    return (stats or {}).get("bytes_limit")


def _mesh(report: _Report, config: ConfigDict, devices: Sequence[jax.Device]) -> Mesh | None:
    with report.noting():
        mesh = make_mesh(**config.mesh, devices=devices)
        multiple, size = batch_rows(mesh), config.train.batch_size
        rows = -(-size // multiple) * multiple
        shape = " × ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
        padding = f" ({rows - size} of them padding)" if rows > size else ""
        report.table("mesh", ("", ""), [
            ("shape", shape),
            ("rows of a batch", f"{rows} for config.train.batch_size = {size}{padding}"),
        ])  # fmt: skip
        return mesh
    return None


# ---- model


def _folder(path: str) -> Path | None:
    """The local model folder, None for a hub id; InputError for a path that is not there."""
    try:
        return files.local(path)
    except InputError as error:
        raise InputError(f"config.model.path: {error}") from error


def _model(report: _Report, config: ConfigDict) -> ModelConfig | None:
    path = config.model.path
    if not path:
        report.table("model", ("", ""), [("config.model.path", "not set")])
        return None
    with report.noting():
        folder = _folder(path)
        if folder is None:
            report.table("model", ("", ""), [("config.model.path", f"{path}: {NOT_LOOKED_AT}")])
            return None
        model, tensors = config_from_folder(folder), {}
        with report.noting():
            tensors = find_tensors(folder)
            model = as_found(model, tensors, folder)
        named = read_config(folder).get("architectures") or [model.model_type]
        rows = [
            ("folder", str(folder)),
            ("architecture", str(named[0])),
            ("parameters", f"{model.num_parameters():,}"),
            ("layers, width", f"{model.num_layers}, {model.hidden_size}"),
            (
                "heads, key/value heads",
                f"{model.num_heads}, {model.num_kv_heads} of {model.head_dim}",
            ),
            ("vocabulary", f"{model.vocab_size:,}"),
        ]
        if tensors:
            count = len({tensor.file for tensor in tensors.values()})
            rows.append(("tensors", f"{len(tensors)} in {count} files"))
        report.table("model", ("", ""), rows)
        return model
    return None


def _attention(report: _Report, config: ConfigDict, model: ModelConfig | None) -> None:
    asked = config.model.attention
    if model is None:
        report.table(
            "attention",
            ("", ""),
            [("config.model.attention", f"{asked}; chosen when a model is known")],
        )
        return
    with report.noting():
        backend = choose_backend(asked, model, config.model.dtype, jax.devices()[0])
        report.table("attention", ("", ""), [("back-end", f"{backend.name}: {backend.why}")])


PLACES = ("path", "shape", "axes", "#per device")


def _place(path: str, shape: tuple[int, ...], sharding: Any, kept: Any) -> tuple[str, ...]:
    """A row: the mesh axis of each dimension, "-" for none, and what ``kept`` takes."""
    spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    return path, _shape(shape), ", ".join(axis or "-" for axis in spec), _mib(tree_bytes(kept))


def _sharding(
    report: _Report, config: ConfigDict, mesh: Mesh, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Where each base weight lies."""
    kept = abstract_weights(config, shapes, mesh)
    bits = config.model.quantization
    held = _base_dtype(config).name + (f", projections {bits}" if bits else "")
    report.table(f"weights ({held})", PLACES, [
        _place(path, shape, weight_sharding(mesh, path, shape), kept[path])
        for path, shape in sorted(shapes.items())
    ])  # fmt: skip


def _adapter_sharding(report: _Report, adapter: Any) -> None:
    """Where each factor of the adapter lies."""
    factors = sorted(flatten_dict(adapter.layers, sep="/").items())
    report.table("adapter (float32); moments and ε lie likewise", PLACES, [
        _place(f"layers/{path}", x.shape, x.sharding, x) for path, x in factors
    ])  # fmt: skip


def _base_dtype(config: ConfigDict) -> Any:
    return jnp.dtype("float32" if config.train.full_parameters else config.model.dtype)


def _memory(
    report: _Report,
    model: Model,
    config: ConfigDict,
    shapes: dict[str, tuple[int, ...]],
    adapter: Any,
) -> None:
    """Bytes that stay on one device all through training, by kind.

    Raises:
        InputError: more than the device has.
    """
    kinds = resident_bytes(model, config, shapes, adapter)
    total = sum(n for _, n in kinds)
    limit = _capacity(model.mesh.local_devices[0])
    rows = [(kind, _mib(n)) for kind, n in (*kinds, ("total", total))]
    report.table("memory of one device", ("kept all through training", "#per device"), rows)
    report.line("(besides: gradients, activations, logits, compiled programs)")
    if limit is not None and total > limit:
        raise InputError(
            f"config.mesh: {_gib(total)} per device needed, but it has {_gib(limit)}; "
            "use more devices, or a larger config.mesh.fsdp or .tensor"
        )


def resident_bytes(
    model: Model, config: ConfigDict, shapes: dict[str, tuple[int, ...]], adapter: Any = None
) -> Bytes:
    """``(kind, bytes per device)`` of what a training run holds between two steps.

    Args:
        model: its static part and mesh; it needs no weights.
        config: validated configuration.
        shapes: of the base weights, by path.
        adapter: what is trained, where it is at hand; by default that of the configuration.

    Raises:
        InputError: ``config.lora.init_from`` is no adapter for this model.
    """
    base = abstract_weights(config, shapes, model.mesh)
    full = config.train.full_parameters
    params = unflatten_dict(base, sep="/") if full else adapter or _adapter(model, config)
    defence = make_defence(config.defence)
    optimizer = optimizer_of(config.optimizer, config.optimizer.learning_rate, defence)
    what = "all weights" if full else f"adapter, r {params.rank} on {' '.join(params.targets)}"
    kinds = [
        (f"trained: {what} (float32)", tree_bytes(params)),
        ("optimizer: AdamW's moments", _abstract_bytes(optimizer.init, params)),
        (
            f"defence: {config.defence.name}'s state, such as ε",
            _abstract_bytes(defence.init, params),
        ),
    ]
    if full:
        return kinds
    # The adapter as it was at step 0 is kept to measure the distance moved.
    started = ("trained: where it started, for ‖w − w₀‖", tree_bytes(params))
    return [(f"base weights ({_base_dtype(config).name})", tree_bytes(base)), *kinds, started]


def _adapter(model: Model, config: ConfigDict) -> Any:
    """The adapter's shapes on the mesh: of ``lora.init_from``, else of a fresh one."""
    if config.lora.init_from:
        return lora.load(config.lora.init_from, model)
    return fresh_adapter(model, config)


def _abstract_bytes(init: Any, params: Any) -> int:
    made = jax.eval_shape(init, params)
    return tree_bytes(placed(made, state_shardings(made, params)))


# ---- files


def _tokenizer(report: _Report, config: ConfigDict) -> Vocabulary | None:
    with report.noting():
        folder = _folder(config.model.path) if config.model.path else None
        if folder is None or not folder.is_dir():
            return None
        found = open_vocabulary(folder)
        _, tokenizer, size = found
        rows = [
            ("class", type(tokenizer).__name__),
            ("entries", f"{len(tokenizer):,} ({size:,} rows in the embedding)"),
            ("end of sequence", f"{tokenizer.eos_token!r} ({tokenizer.eos_token_id})"),
            ("prompt template", make_template(config, tokenizer).id),
        ]
        report.table("tokenizer", ("", ""), rows)
        return found
    return None


def _judge(report: _Report, config: ConfigDict) -> None:
    """What the judge reads, and whether its folder can be used."""
    name, path = config.judge.name, config.judge.path
    if not needs_model(name):
        report.table("judge", ("", ""), [(name, "word lists; needs no model")])
        return
    with report.noting():
        try:
            local = files.local(path) is not None
        except InputError as error:
            raise InputError(f"config.judge.path: {error}") from error
        read = make_judge(config).version if local else NOT_LOOKED_AT
        report.table("judge", ("", ""), [(name, path), ("judge version", read)])


def _sources(report: _Report, config: ConfigDict, vocabulary: Vocabulary | None) -> None:
    keys = [(f"config.data.{name}", config.data[name], True) for name in STREAMS]
    keys += [(f"config.eval.tasks[{i}]", spec, False) for i, spec in enumerate(config.eval.tasks)]
    rows = []
    for key, spec, trained in keys:
        if spec:
            with report.noting():
                records = _records(spec, key, trained, config.data)
                rows.append((key, spec, NOT_LOOKED_AT if records is None else f"{len(records):,}"))
                if records and vocabulary:
                    _check_ids(records, vocabulary, config, f"{key}: {spec}", trained)
    if rows:
        report.table("sources", ("key", "source", "#records"), rows)
    _enough(report, config)


def _records(spec: str, key: str, trained: bool, data: ConfigDict) -> list[Record] | None:
    """The records of a local source; None of one on the hub."""
    try:
        if not is_local(spec):
            return None
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    if trained:
        return training_records(spec, key, layout_of(data))
    return load_records(spec, key, layout=layout_of(data))


def _check_ids(
    records: Sequence[Record], vocabulary: Vocabulary, config: ConfigDict, where: str, trained: bool
) -> None:
    """Whether the model knows every token of what is trained on, or asked."""
    template = make_template(config, vocabulary.tokenizer)
    ids: Iterable[Any] = (encode_prompt(record, template) for record in records)
    if trained:
        ids = (encode(record, template, config.data.max_length).tokens for record in records)
    check_ids(ids, vocabulary.size, where)


def _enough(report: _Report, config: ConfigDict) -> None:
    """Whether the local sources hold as many records as the stages will take."""
    data = config.data
    if report.problems:
        return  # a source that cannot be read has said so already
    with report.noting():
        if is_local(data.user) and (not data.attack or is_local(data.attack)):
            user_records(config)
        for name in ("alignment", "harmful"):
            if is_local(data[name]):
                defender_records(config, name)


# ---- formats


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(str(n) for n in shape)


def _mib(n: int) -> str:
    return f"{n / 2**20:,.2f} MiB"


def _gib(n: int | None) -> str:
    return "not said" if n is None else f"{n / 2**30:,.1f} GiB"
