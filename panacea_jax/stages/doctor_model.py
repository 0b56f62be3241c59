"""What ``doctor`` says of the model: what it is, how it attends, where its weights lie, and the memory that training keeps."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from panacea_jax.config import make_defence
from panacea_jax.defences.protocol import has_steps
from panacea_jax.errors import InputError
from panacea_jax.memory import limit_of
from panacea_jax.models import lora
from panacea_jax.models.config import ModelConfig, read_config
from panacea_jax.models.families import config_from_folder
from panacea_jax.models.fused import choose_backend
from panacea_jax.models.head import as_found
from panacea_jax.models.model import Model, abstract_model
from panacea_jax.models.weights import find_tensors
from panacea_jax.parallel import weight_sharding
from panacea_jax.planning.abstract_step import (
    abstract_state,
    abstract_weights,
    fresh_adapter,
    resident,
    told,
    tree_bytes,
)
from panacea_jax.stages.doctor_report import NOT_LOOKED_AT, Report, gib, mib, model_folder
from panacea_jax.train.optimizer import optimizer_of

Bytes = list[tuple[str, int]]
PLACES = ("path", "shape", "axes", "#per device")


def describe_model(report: Report, config: ConfigDict) -> ModelConfig | None:
    """Print what the folder holds; returns the architecture, None where it is not known."""
    path = config.model.path
    if not path:
        report.table("model", ("", ""), [("config.model.path", "not set")])
        return None
    with report.noting():
        folder = model_folder(path)
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


def describe_attention(report: Report, config: ConfigDict, model: ModelConfig | None) -> None:
    """Print which back-end the attention will use, and why."""
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


def describe_memory(report: Report, config: ConfigDict, model: ModelConfig, mesh: Mesh) -> None:
    """Print where weights and adapter lie, and the memory that stays taken."""
    graphdef, shapes = abstract_model(model, config.model.dtype, config.model.remat)
    static = Model(model, graphdef, None, jnp.dtype(config.model.dtype), mesh)
    with report.noting():
        _sharding(report, config, mesh, shapes)
        adapter = None
        if not config.train.full_parameters:
            adapter = _adapter(static, config)
            _adapter_sharding(report, adapter)
        _memory(report, static, config, shapes, adapter)


def _place(path: str, shape: tuple[int, ...], sharding: Any, kept: Any) -> tuple[str, ...]:
    """A row: the mesh axis of each dimension, "-" for none, and what ``kept`` takes."""
    spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    return path, _shape(shape), ", ".join(axis or "-" for axis in spec), mib(tree_bytes(kept))


def _sharding(
    report: Report, config: ConfigDict, mesh: Mesh, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Where each base weight lies."""
    kept = abstract_weights(config, shapes, mesh)
    bits = config.model.quantization
    held = _base_dtype(config).name + (f", projections {bits}" if bits else "")
    report.table(f"weights ({held})", PLACES, [
        _place(path, shape, weight_sharding(mesh, path, shape), kept[path])
        for path, shape in sorted(shapes.items())
    ])  # fmt: skip


def _adapter_sharding(report: Report, adapter: Any) -> None:
    """Where each factor of the adapter lies."""
    factors = sorted(flatten_dict(adapter.layers, sep="/").items())
    report.table("adapter (float32); moments and ε lie likewise", PLACES, [
        _place(f"layers/{path}", x.shape, x.sharding, x) for path, x in factors
    ])  # fmt: skip


def _base_dtype(config: ConfigDict) -> Any:
    return jnp.dtype("float32" if config.train.full_parameters else config.model.dtype)


def _memory(
    report: Report,
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
    limit = limit_of(model.mesh.local_devices[0])
    rows = [(kind, mib(n)) for kind, n in (*kinds, ("total", total))]
    report.table("memory of one device", ("kept all through training", "#per device"), rows)
    report.line("(besides: gradients, activations, logits, compiled programs)")
    if limit is not None and total > limit:
        raise InputError(
            f"config.mesh: {gib(total)} per device needed, but it has {gib(limit)}; "
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
    base = unflatten_dict(abstract_weights(config, shapes, model.mesh), sep="/")
    full = config.train.full_parameters
    params = base if full else adapter or _adapter(model, config)
    method = make_defence(config.defence)
    if has_steps(method):
        method = told(method, config)
    optimizer = optimizer_of(config.optimizer, config.optimizer.learning_rate, method)
    state, _ = abstract_state(params, method, optimizer)
    what = "all weights" if full else f"adapter, r {params.rank} on {' '.join(params.targets)}"
    titles = {
        "base weights": f"base weights ({_base_dtype(config).name})",
        "trained weights": f"trained: {what} (float32)",
        "optimizer": "optimizer: AdamW's moments",
        "defence": f"defence: {config.defence.name}'s state, such as ε",
        # The adapter as it was at step 0 is kept to measure the distance moved.
        "start of training": "trained: where it started, for ‖w − w₀‖",
    }
    return [(titles[kind], n) for kind, n in resident(state, None if full else base).items()]


def _adapter(model: Model, config: ConfigDict) -> Any:
    """The adapter's shapes on the mesh: of ``lora.init_from``, else of a fresh one."""
    if config.lora.init_from:
        return lora.load(config.lora.init_from, model)
    return fresh_adapter(model, config)


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(str(n) for n in shape)
