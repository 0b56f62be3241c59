"""A training step as shapes with places: what is planned, compiled or measured without any weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from panacea_jax.config import batch_sizes, make_defence
from panacea_jax.data.batches import Batch
from panacea_jax.defences import Defence
from panacea_jax.defences.protocol import Method, has_steps
from panacea_jax.errors import InputError
from panacea_jax.models import lora, quantise
from panacea_jax.models.config import ModelConfig
from panacea_jax.models.fused import Backend, choose_backend
from panacea_jax.models.model import Model, abstract_model
from panacea_jax.parallel.chips import Chip
from panacea_jax.parallel.sharding import (
    adapter_shardings,
    batch_rows,
    batch_sharding,
    bytes_per_device,
    replicated,
    weight_sharding,
)
from panacea_jax.train.optimizer import optimizer_of
from panacea_jax.train.step import TrainState, fresh_state, state_shardings


class AbstractStep(NamedTuple):
    """The arguments of a training step as shapes with shardings, what they belong to, and the platform of the devices it is for."""

    model: Model
    defence: Defence
    optimizer: Any
    shardings: Any
    state: TrainState
    weights: Any
    batches: dict[str, Batch]
    key: Any
    attention: Backend
    remat: str
    platform: str
    accumulate: int = 1


def abstract_step(
    config: ConfigDict, model: ModelConfig, mesh: Mesh, target: Chip | None = None
) -> AbstractStep:
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
    graphdef, shapes = abstract_model(model, c.dtype, c.remat, c.attention)
    static = Model(model, graphdef, None, jnp.dtype(config.model.dtype), mesh)
    base = unflatten_dict(abstract_weights(config, shapes, mesh), sep="/")
    params = base if full else fresh_adapter(static, config)
    defence = make_defence(config.defence)
    if not has_steps(defence):
        raise InputError(
            f"config.defence.name = {config.defence.name}: acts in one shot; there is no step to plan"
        )
    defence = told(defence, config)
    optimizer = optimizer_of(config.optimizer, config.optimizer.learning_rate, defence)
    state, shardings = abstract_state(params, defence, optimizer)
    parts, length = batch_rows(mesh) * config.train.accumulate, config.data.max_length

    def batch(size: int) -> Batch:
        rows = -(-size // parts) * parts
        segments = (jnp.int32,) if config.data.packing else ()
        kinds = (jnp.int32, jnp.bool_, jnp.bool_, *segments)
        return Batch(*(_like((rows, length), kind, batch_sharding(mesh)) for kind in kinds))

    batches = {name: batch(size) for name, size in stream_sizes(config, defence).items()}
    if defence.by_record:
        batches["user"] = batches["user"]._replace(numbers=batches["user"].tokens)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = _like(key.shape, key.dtype, replicated(mesh))
    weights = None if full else base
    place = target or mesh.devices.flat[0]
    backend = choose_backend(c.attention, model, c.dtype, place)
    return AbstractStep(
        static,
        defence,
        optimizer,
        shardings,
        state,
        weights,
        batches,
        key,
        backend,
        c.remat,
        place.platform,
        config.train.accumulate,
    )


def told(defence: Defence, config: ConfigDict) -> Defence:
    """A method that has been told how many steps and records there are, as far as the configuration says."""
    defence = defence.for_steps(config.train.steps or 1)  # any number: it decides no shape
    return defence.for_records(config.data.num_examples or 1)  # 0: as many as the source holds, a few bytes each


def abstract_state(params: Any, method: Method, optimizer: Any) -> tuple[TrainState, Any]:
    """The state before step 0 as shapes with places, of arrays or shapes that are trained; and the places alone."""
    state = jax.eval_shape(lambda params: fresh_state(params, method, optimizer), params)
    shardings = state_shardings(state, params)
    return placed(state, shardings), shardings


def stream_sizes(config: ConfigDict, defence: Defence) -> dict[str, int]:
    """Records a step of the user's stream and of those that the defence asks for."""
    sizes = batch_sizes(config.train)
    extra = {name: spec.first or sizes[name] * spec.repeats for name, spec in defence.streams.items()}
    return {"user": sizes["user"], **extra}


def abstract_weights(
    config: ConfigDict, shapes: Mapping[str, tuple[int, ...]], mesh: Mesh
) -> dict[str, Any]:
    """All weights by path, as they are kept: float32 where they are trained, the projections in few bits if so configured.

    Raises:
        InputError: an axis of the mesh does not divide a layer's weight.
    """
    kept = jnp.dtype("float32" if config.train.full_parameters else config.model.dtype)
    bits = config.model.quantization
    # Weights in few bits are loaded whole first, so that the mesh has to divide them too.
    places = {path: weight_sharding(mesh, path, shape) for path, shape in shapes.items()}
    return {
        path: quantise.abstract_quantised(mesh, path, shape, bits) if bits and quantise.is_quantised(path)
        else _like(shape, kept, places[path])
        for path, shape in shapes.items()
    }  # fmt: skip


def fresh_adapter(model: Model, config: ConfigDict) -> Any:
    """The shapes of a fresh adapter on the mesh."""
    o = config.lora
    made = jax.eval_shape(
        lambda key: lora.init(
            model, o.rank, o.alpha, o.targets,
            key=key, rslora=o.rslora, dropout=o.dropout, layers=o.layers,
        ),
        jax.random.key(0),
    )
    places = adapter_shardings(model.mesh, made.layers)
    return dataclasses.replace(made, layers=placed(made.layers, places))


def placed(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with the places of another."""
    return jax.tree.map(lambda x, s: _like(x.shape, x.dtype, s), shapes, shardings)


def _like(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def resident(state: TrainState, weights: Any) -> dict[str, int]:
    """Bytes of one device by kind, of what stays between steps.

    Args:
        state: of training.
        weights: of the base; None where all are trained.
    """
    kinds = {
        "trained weights": state.params,
        "optimizer": state.opt_state,
        "defence": state.defence_state,
    }
    if weights is not None:
        kinds = {"base weights": weights, **kinds, "start of training": state.params}
    return {kind: tree_bytes(tree) for kind, tree in kinds.items()}


def tree_bytes(tree: Any) -> int:
    """Bytes of one device's shards."""
    return sum(
        bytes_per_device(x.sharding, tuple(x.shape), x.dtype.itemsize)
        for x in jax.tree.leaves(tree)
    )
