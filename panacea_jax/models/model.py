"""A loaded model: the static graph of the decoder and its weights, apart from each other.

Inside jit only ``graphdef`` and other static fields of :class:`Model` may be used; weights are
passed as arguments, so that one compiled step serves any values and no weight becomes a constant of
the program.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from panacea_jax.errors import InputError
from panacea_jax.models import head
from panacea_jax.models.bound import BoundDecoder, Inputs
from panacea_jax.models.cache import KVCache
from panacea_jax.models.config import ModelConfig
from panacea_jax.models.decoder import Decoder
from panacea_jax.models.families import config_from_folder
from panacea_jax.models.fused import choose_backend
from panacea_jax.models.hub import local_folder
from panacea_jax.models.quantise import is_quantised, quantiser
from panacea_jax.models.weights import find_tensors, load_weights
from panacea_jax.parallel import make_mesh, weight_sharding

DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with its base weights.

    Attributes:
        config: shapes and variants.
        graphdef: Flax NNX graph of the :class:`Decoder`; hashable.
        weights: nested dict of arrays, layers stacked on axis 0; None where all weights are trained
            and live in ``params``.
        dtype: compute dtype.
        mesh: device mesh that the weights are placed on.
        folder: Hugging Face folder they came from, or None.
    """

    config: ModelConfig
    graphdef: Any
    weights: Any
    dtype: Any
    mesh: Mesh
    folder: Path | None = None

    def bind(self, weights: Any, params: Any) -> BoundDecoder:
        """The decoder with its numbers: the one place where weights, adapter and mesh come together.

        Args:
            weights: base weights; ignored where ``params`` holds all weights.
            params: an adapter (``.layers`` and ``.scale``), a complete nested dict of weights, or
                None for the bare base.
        """
        full, adapter, scale = split_params(weights, params)
        dropout, numbers = getattr(params, "dropout", 0.0), getattr(params, "numbers", None)
        decoder = nnx.merge(self.graphdef, full)
        return BoundDecoder(decoder, adapter, scale, self.mesh, dropout, numbers)

    def apply(
        self,
        weights: Any,
        params: Any,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        valid: Bool[Array, "B T"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T V"], KVCache | None]:
        """Logits ``[B, T, V]`` in at least float32, and the cache with the new tokens in it.

        Args:
            weights, params: as of :meth:`bind`.
            tokens: token ids.
            positions: position of each token; by default its index among the valid ones of its row, counted on from the cache's.
            valid: False for padding; by default all are valid.
            cache: keys and values of earlier tokens; no token is padding then.
        """
        bound = self.bind(weights, params)
        first = 0 if cache is None else cache.next[:, None]
        inputs = Inputs.of(tokens, valid, positions=positions, first=first)
        x, cache = bound.hidden(inputs, cache)
        return bound.logits(x), cache


def split_params(weights: Any, params: Any) -> tuple[Any, Any, Any]:
    """``(all weights, adapter factors or None, adapter scale)`` from the frozen base and the
    trainable pytree.
    """
    if params is None:
        return weights, None, 1.0
    if isinstance(params, Mapping):
        return params, None, 1.0
    return weights, params.layers, params.scale


@functools.lru_cache(maxsize=32)
def abstract_model(
    config: ModelConfig, dtype: str = "float32", remat: str = "none", attention: str = "auto"
) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The decoder's graph and the shape of each weight by path; nothing is allocated.

    Raises:
        InputError: unknown dtype, remat or attention.
    """
    decoder = nnx.eval_shape(lambda: Decoder(config, _dtype(dtype), remat, attention))
    graphdef, state = nnx.split(decoder)
    flat = flatten_dict(nnx.to_pure_dict(state), sep="/")
    return graphdef, {path: x.shape for path, x in flat.items()}


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise InputError(f"config.model.dtype = {name}: one of {', '.join(DTYPES)}")
    if name == "float64" and jnp.result_type(float) != jnp.float64:
        raise InputError("config.model.dtype = float64: needs JAX_ENABLE_X64=1")
    return jnp.dtype(name)


def _shardings(mesh: Mesh, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {path: weight_sharding(mesh, path, shape) for path, shape in shapes.items()}


def _quantised(mesh: Mesh, kind: str, path: str, weight: jax.Array) -> Any:
    """What becomes of a weight that was just loaded."""
    if not kind or not is_quantised(path):
        return weight
    return quantiser(mesh, path, weight.shape, kind)(weight)


def load(
    folder: str | PurePath,
    *,
    mesh: Mesh | None = None,
    dtype: str = "bfloat16",
    weights_dtype: str | None = None,
    remat: str = "none",
    attention: str = "auto",
    classifier: bool = False,
    quantization: str = "",
) -> Model:
    """Load a Hugging Face folder (or hub id), each weight straight to the devices that hold a part
    of it.

    Args:
        folder: a folder with ``config.json`` and safetensors, or a hub id ``owner/name``.
        mesh: devices; by default all of them on the data axis.
        dtype: compute dtype.
        weights_dtype: dtype that the weights are kept in; the compute dtype by default.
        remat: see :class:`Decoder`.
        attention: see :class:`Decoder`.
        classifier: the folder holds a sequence classifier: its labels take the vocabulary's place
            in the logits.
        quantization: hold the projections in "int8" or "nf4", see :mod:`panacea_jax.models.quantise`.

    Raises:
        InputError: the folder, its config or a tensor is not usable; names it.
    """
    path = local_folder(folder)
    config = head.as_found(
        config_from_folder(path, classifier=classifier), find_tensors(path), path
    )
    graphdef, shapes = abstract_model(config, dtype, remat, attention)
    mesh = make_mesh() if mesh is None else mesh
    backend = choose_backend(attention, config, dtype, mesh.devices.flat[0])
    logging.info("attention: %s (%s)", *backend)
    kept = _dtype(weights_dtype or dtype)
    finish = functools.partial(_quantised, mesh, quantization)
    weights = load_weights(path, shapes, kept, _shardings(mesh, shapes), finish)
    return Model(config, graphdef, weights, jnp.dtype(dtype), mesh, path)


def random_model(
    config: ModelConfig,
    key: Key[Array, ""],
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    weights_dtype: str | None = None,
    remat: str = "none",
    attention: str = "auto",
    stddev: float = 0.02,
) -> Model:
    """A model with random weights, drawn where they live: normal matrices, zero biases, norms that
    do nothing.

    Args:
        config: shapes and variants.
        key: random key.
        mesh: as in :func:`load`. dtype: likewise. weights_dtype: likewise. remat: likewise.
            attention: likewise.
        stddev: of matrices and embeddings (``initializer_range`` in Hugging Face's configurations).
    """
    graphdef, shapes = abstract_model(config, dtype, remat, attention)
    mesh = make_mesh() if mesh is None else mesh
    choose_backend(attention, config, dtype, mesh.devices.flat[0])
    kept = _dtype(weights_dtype or dtype)

    def draw(key: Any) -> dict[str, Any]:
        keys = dict(zip(sorted(shapes), jax.random.split(key, len(shapes))))
        return {path: _draw(keys[path], path, shape) for path, shape in shapes.items()}

    def _draw(key: Any, path: str, shape: tuple[int, ...]) -> Any:
        if path.endswith("/scale"):
            return jnp.full(shape, 0.0 if config.unit_offset_norm else 1.0, kept)
        if path.endswith("/bias"):
            return jnp.zeros(shape, kept)
        return (stddev * jax.random.normal(key, shape, jnp.float32)).astype(kept)

    flat = jax.jit(draw, out_shardings=_shardings(mesh, shapes))(key)
    return Model(config, graphdef, unflatten_dict(flat, sep="/"), jnp.dtype(dtype), mesh)
