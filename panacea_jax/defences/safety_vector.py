"""What alignment changed, Δ = W_aligned − W_base, read from the model before it one matrix at a time.

Everything is transposed with respect to the papers: our matrices are ``[in, out]``, so their ``B A`` is ``a b``, and their projection
``P B`` with ``P = Δ Δᵀ / ‖Δ‖_F`` is ``b Δᵀ Δ / ‖Δ‖_F`` with our Δ. The out × out matrix P is never formed.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from panacea_jax.defences.loss import Loss
from panacea_jax.errors import InputError
from panacea_jax.models.adapter import BLOCK_OF, Adapter
from panacea_jax.models.hub import local_folder
from panacea_jax.models.quantise import whole
from panacea_jax.models.tensorfile import Tensor
from panacea_jax.models.weights import find_tensors, load_layer


def unaligned_tensors(base: str, title: str) -> dict[str, Tensor]:
    """Where the matrices of the model before its alignment lie.

    Args:
        base: what ``config.defence.base`` names.
        title: of the method, for messages.

    Raises:
        InputError: ``base`` is not set, or not a model.
    """
    if not base:
        raise InputError(f"config.defence.base is not set: {title} needs the model before its alignment")
    try:
        return find_tensors(local_folder(base))
    except InputError as error:
        raise InputError(f"config.defence.base = {base}: {error}") from error


class Shift(NamedTuple):
    """Δ of one projection of one layer.

    Attributes:
        target: the projection.
        layer: its number in the model.
        place: of the layer in the stacks of what is adapted.
        delta: Δ.
    """

    target: str
    layer: int
    place: int
    delta: Float[Array, "in out"]


def shifts(
    weights: Any, targets: Sequence[str], layers: Sequence[int], tensors: Mapping[str, Tensor], title: str, dtype: Any,
    aligned: Adapter | None = None,
) -> Iterator[Shift]:  # fmt: skip
    """Δ of every projection, one after the other: each matrix of the model before is read when its turn comes.

    Args:
        weights: of the aligned model, or of its base.
        targets: projections by their Hugging Face names.
        layers: their layers.
        tensors: of the model before.
        title: of the method, for messages.
        dtype: of Δ.
        aligned: what makes the aligned model of ``weights``; None: they are aligned.

    Raises:
        InputError: the model before has not the same matrices, or the weights are quantised.
    """
    for target in targets:
        path = f"layers/{BLOCK_OF[target]}/{target}/kernel"
        kernel = whole(weights["layers"][BLOCK_OF[target]][target]["kernel"], title)
        for place, layer in enumerate(layers):
            before = load_layer(tensors, path, layer, kernel)
            yield Shift(target, layer, place, _shift(kernel[layer], before, _product_of(aligned, target, layer), dtype))


def _product_of(adapter: Adapter | None, target: str, layer: int) -> tuple[float, tuple[Array, Array]] | None:
    """What an adapter adds to a projection of a layer; None: nothing."""
    if adapter is None or target not in adapter.targets or (place := adapter.place(layer)) is None:
        return None
    return adapter.scale, factors_of(adapter, target, place)


def factors_of(adapter: Adapter, target: str, place: int) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
    """a and b of a projection, by its place in the stacks."""
    pair = adapter.layers[BLOCK_OF[target]][target]
    return pair["a"][place], pair["b"][place]


@functools.partial(jax.jit, static_argnames="dtype")
def _shift(
    kernel: Float[Array, "in out"], before: Float[Array, "in out"], merged: tuple[Any, tuple[Array, Array]] | None, dtype: Any
) -> Float[Array, "in out"]:
    delta = kernel.astype(dtype) - before.astype(dtype)
    if merged is None:
        return delta
    scale, (a, b) = merged
    with jax.default_matmul_precision("highest"):
        return delta + scale * (a @ b)


class Projection(NamedTuple):
    """Safe LoRA's look at a projection.

    Attributes:
        projected: ``P B`` in our orientation.
        cosine: c = cos(P B A, B A).
        size: ‖Δ‖_F; 0 where the model before is the aligned one.
    """

    projected: Float[Array, "r out"]
    cosine: Float[Array, ""]
    size: Float[Array, ""]


def projections(
    loss: Loss, params: Adapter, base: str, aligned: Adapter | None, title: str
) -> Iterator[tuple[Shift, Projection]]:
    """Safe LoRA's look at every module of an adapter, one after the other.

    Args:
        loss: of the base that the adapter belongs to.
        params: the adapter.
        base: what ``config.defence.base`` names.
        aligned: what makes the aligned model of that base; None: it is aligned.
        title: of the method, for messages.

    Raises:
        InputError: ``base`` is not set, has not the same matrices, or does not differ from the aligned model.
    """
    tensors = unaligned_tensors(base, title)
    dtype = jax.tree.leaves(params)[0].dtype
    for shift in shifts(loss.weights, params.targets, params.adapted, tensors, title, dtype, aligned):
        found = _project(shift.delta, *factors_of(params, shift.target, shift.place))
        if not float(found.size):
            raise InputError(
                f"config.defence.base = {base}: {shift.target} of layer {shift.layer} is the aligned model's; give the one before"
            )
        yield shift, found


@jax.jit
def _project(
    delta: Float[Array, "in out"], a: Float[Array, "in r"], b: Float[Array, "r out"]
) -> Projection:
    with jax.default_matmul_precision("highest"):
        size = jnp.linalg.norm(delta)
        projected = (b @ delta.T) @ delta / jnp.where(size > 0, size, 1)
        gram = a.T @ a  # ⟨a x, a y⟩ = Σ (gram x) ∘ y
        dot = jnp.sum((gram @ projected) * b)
        norms = jnp.sqrt(jnp.sum((gram @ projected) * projected) * jnp.sum((gram @ b) * b))
    return Projection(projected, dot / jnp.maximum(norms, 1e-8), size)


Change = Callable[[str, int | None, Array, Array], Array]


def anew(weights: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """All weights, each layer of each array changed by itself and put where the array lies.

    Args:
        weights: nested dict of arrays, layers stacked on axis 0.
        change: gets the path of an array, the layer (None for an array without layers), what the array holds there, and the whole array.
    """

    def of_array(path: str, w: Array) -> Array:
        if not path.startswith("layers/"):
            return jax.device_put(change(path, None, w, w), w.sharding)
        put = jax.jit(_put, donate_argnums=0, out_shardings=w.sharding)
        new = jnp.copy(w)
        for layer in range(len(w)):
            new = put(new, change(path, layer, w[layer], w), layer)
        return new

    return unflatten_dict({path: of_array(path, w) for path, w in flatten_dict(weights, sep="/").items()}, sep="/")


def _put(stacked: Array, piece: Array, layer: int | Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, piece.astype(stacked.dtype), layer, 0)
