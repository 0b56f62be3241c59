"""A frozen base in 8 or 4 bits: the projections of all layers, in blocks along their input.

``int8`` is symmetric with one scale for each block; ``nf4`` is the 4-bit NormalFloat of QLoRA (Dettmers et al., arXiv 2305.14314, §3),
whose 16 levels are quantiles of the normal distribution. Scales are float32 and not quantised again: 8.5 and 4.5 bits a weight.
Embeddings, head and norms stay as they are. Weights are brought back where they are used, layer by layer, and again in the backward pass.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from panacea_jax.errors import InputError
from panacea_jax.parallel.sharding import weight_sharding

QUANTIZATIONS = ("int8", "nf4")
# Inputs that share a scale; fewer where 64 does not divide them.
_BLOCK = 64


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("kind",)
)
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A kernel ``[…, in, out]``.

    Attributes:
        values: int8 ``[…, in, out]``, or uint8 ``[…, in / 2, out]`` with inputs 2i and 2i + 1 in the low and the high four bits.
        scale: float32 ``[…, in / block, out]``, the largest magnitude in each block.
        kind: one of ``KINDS``.
    """

    values: Any
    scale: Any
    kind: str

    def __getitem__(self, index: Any) -> "Quantised":
        """Some layers of a stack, or all (``...``)."""
        return jax.tree.map(lambda x: x[index], self)

    def dense(self, dtype: Any) -> Float[Array, "*L D F"]:
        """The weights that it stands for."""
        if self.kind == "int8":
            levels = self.values.astype(jnp.float32) / 127
        else:
            both = jnp.stack([self.values & 15, self.values >> 4], axis=-2)
            codes = both.reshape(*self.values.shape[:-2], -1, self.values.shape[-1])
            levels = jnp.asarray(nf4_levels())[codes]
        *stack, blocks, out = self.scale.shape
        by_block = levels.reshape(*stack, blocks, -1, out) * self.scale[..., None, :]
        return by_block.reshape(levels.shape).astype(dtype)

    def product(self, x: Float[Array, "*N D"]) -> Float[Array, "*N F"]:
        """``x W``; the backward pass brings W back once more, or every layer's would be kept."""
        return jax.checkpoint(lambda x, w: x @ w.dense(x.dtype), prevent_cse=False)(x, self)


@functools.cache
def nf4_levels() -> np.ndarray:
    """The 16 levels of NF4, −1 to 1: zero, and quantiles evenly spaced in probability, seven below and eight above."""
    outermost = 0.9677083  # so that the outer levels are at the middle of the outermost 1/16 and 1/15 (paper's appendix E and code)
    quantile = statistics.NormalDist().inv_cdf
    below = [quantile(1 - p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    above = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    levels = np.array(sorted([*below, 0.0, *above]))
    return (levels / max(above)).astype(np.float32)


def quantise(kernel: Float[Array, "*L D F"], kind: str) -> Quantised:
    """Round a kernel to the nearest levels; a block of zeros stays zero.

    Raises:
        ValueError: ``nf4`` and an odd number of inputs.
    """
    *stack, inputs, out = kernel.shape
    block = math.gcd(inputs, _BLOCK)
    by_block = kernel.astype(jnp.float32).reshape(*stack, inputs // block, block, out)
    scale = jnp.max(jnp.abs(by_block), axis=-2)
    levels = by_block / jnp.where(scale == 0, 1, scale)[..., None, :]
    levels = levels.reshape(kernel.shape)
    if kind == "int8":
        return Quantised(jnp.round(levels * 127).astype(jnp.int8), scale, kind)
    if inputs % 2:
        raise ValueError(f"nf4 packs pairs of inputs, there are {inputs}")
    table = nf4_levels()
    codes = jnp.searchsorted(jnp.asarray((table[1:] + table[:-1]) / 2), levels).astype(jnp.uint8)
    pairs = codes.reshape(*stack, inputs // 2, 2, out)
    return Quantised(pairs[..., 0, :] | pairs[..., 1, :] << 4, scale, kind)


def is_quantised(path: str) -> bool:
    """Whether a weight is among those that are held in few bits."""
    return path.startswith("layers/") and path.endswith("_proj/kernel")


def quantiser(mesh: Mesh, path: str, shape: tuple[int, ...], kind: str) -> Callable[[Any], Any]:
    """A jitted ``quantise`` of a stack, one layer at a time, that places its result by the rules for ``path``."""

    def layer_by_layer(kernels: Float[Array, "L D F"]) -> Quantised:
        return jax.lax.map(functools.partial(quantise, kind=kind), kernels)

    places = jax.tree.map(lambda x: x.sharding, abstract_quantised(mesh, path, shape, kind))
    return jax.jit(layer_by_layer, out_shardings=places)


def abstract_quantised(mesh: Mesh, path: str, shape: tuple[int, ...], kind: str) -> Quantised:
    """Shapes and places of a quantised kernel, by the rules for ``path``."""
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    made = jax.eval_shape(functools.partial(quantise, kind=kind), kernel)

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=weight_sharding(mesh, path, x.shape, uneven=True)
        )

    return jax.tree.map(placed, made)


def whole(kernel: Any, what: str) -> Any:
    """The kernel as it is, on a device or on the host, if it is not quantised.

    Raises:
        InputError: it is, and ``what`` needs it in full.
    """
    if isinstance(kernel, Quantised):
        raise InputError(f"config.model.quantization = {kernel.kind}: {what} needs whole weights")
    return kernel
