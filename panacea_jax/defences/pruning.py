"""What the pruning methods share: which matrices are pruned, which entries of a row stand out, and cutting them.

Pruned are both factors of every adapted projection, or, of all weights, the kernels of q, k and v (as Antidote's public code). Ours are
``[L, in, out]``, transposes of PyTorch's ``[out, in]``: an output *row* there is a column here.
"""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from panacea_jax.defences.protocol import Params
from panacea_jax.errors import InputError

_PRUNED = re.compile(r"layers\.\w+\.\w+\.[ab]|layers\.self_attn\.[qkv]_proj\.kernel")

Matrix = Float[Array, "L in out"]
Mask = Bool[Array, "L in out"]


def check_dense_ratio(ratio: float | int) -> None:
    """Raises:
    InputError: not a share.
    """
    if not 0 <= ratio <= 1:
        raise InputError(f"config.defence.dense_ratio = {ratio}: a share between 0 and 1")


def pruned_matrices(params: Params) -> dict[str, Matrix]:
    """What is pruned, by dotted name, e.g. ``layers.self_attn.q_proj.a``."""
    named = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    return {name: x for name, x in named.items() if _PRUNED.fullmatch(name)}


@functools.partial(jax.jit, static_argnames="dense_ratio")
def top_of_rows(scores: Matrix, dense_ratio: float | int) -> Mask:
    """Of each output the inputs with the highest scores: all but ``int(in · (1 − dense_ratio))`` of them.

    Of equal scores the later input is taken, as by PyTorch's stable sort.
    """
    left_out = int(scores.shape[1] * (1 - dense_ratio))

    def of_layer(layer: Float[Array, "in out"]) -> Bool[Array, "in out"]:
        rank = jnp.argsort(jnp.argsort(layer, axis=0, stable=True), axis=0, stable=True)
        return rank >= left_out

    return jax.lax.map(of_layer, scores)  # one layer's ranks at a time


def prune(params: Params, mask: Callable[[str, Matrix], Mask]) -> Params:
    """``W ⊙ (1 − mask)`` for every matrix that is pruned; ``mask`` gets its name and itself."""

    def cut(path: tuple[object, ...], w: Array) -> Array:
        name = _name(path)
        if not _PRUNED.fullmatch(name):
            return w
        return _cut(w, mask(name, w))

    return jax.tree_util.tree_map_with_path(cut, params)


@jax.jit
def _cut(w: Matrix, mask: Mask) -> Matrix:
    return jnp.where(mask, jnp.zeros((), w.dtype), w)


def _name(path: tuple[object, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def count_pruned(params: Params, pruned: Params) -> dict[str, int]:
    """How many entries were set to 0 that were not, of how many."""
    before, after = pruned_matrices(params), pruned_matrices(pruned)
    cut = {name: jnp.sum((w != 0) & (after[name] == 0)) for name, w in before.items()}
    return {"pruned": sum(map(int, cut.values())), "entries": sum(w.size for w in before.values())}
