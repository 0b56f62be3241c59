"""A checksum of every array, of its bits alone: the same on one device and spread over many, on an accelerator and on the host.

Each 32-bit word is multiplied by an odd number that depends on its place, and all are added modulo 2³². Such a sum does not depend on the
order in which it is taken, so every device adds what it holds; and a change of one word, of however many bits, always changes it. Two sums
with different numbers make 64 bits: other damage goes unnoticed with a probability of 2⁻⁶⁴. It is made against accidents; whoever means to
can make another array with the same checksum.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from panacea_jax.parallel import processes

_SEEDS = (0, 0x9E3779B9)


def checksums(arrays: Mapping[str, Any]) -> dict[str, str]:
    """The checksum of each array, 16 hexadecimal digits, by its name. Where several processes hold parts of them, all must ask.

    Args:
        arrays: of jax or NumPy, of any shape, placement and dtype of 8 to 64 bits.
    """
    sums = {name: _sums(array) for name, array in arrays.items()}  # all under way before the first is waited for
    return {name: "".join(f"{word:08x}" for word in processes.to_host(pair).tolist()) for name, pair in sums.items()}


@jax.jit
def _sums(array: Any) -> UInt32[Array, "2"]:
    words = _words(array)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, stride in enumerate(_strides(words.shape)):
        place += np.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.stack([jnp.sum(words * (_mixed(place ^ np.uint32(seed)) | 1), dtype=jnp.uint32) for seed in _SEEDS])


def _words(array: Any) -> Any:
    """The bits of an array, as ``uint32`` of its shape; of 64 bits with an axis of two words more."""
    array = jnp.asarray(array)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    bits = min(32, 8 * array.dtype.itemsize)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _strides(shape: tuple[int, ...]) -> list[int]:
    """How far apart neighbours on each axis are in the flat array, modulo 2³²."""
    return [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]


def _mixed(place: Any) -> Any:
    """Numbers that look random, by place: the last steps of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        place = (place ^ (place >> shift)) * np.uint32(factor)
    return place
