"""LoX: an aligned model moved on along the main directions of its alignment, before anybody fine-tunes it (arXiv 2506.15606, COLM 2025).

    W ← W + α · SVD_k(W − W_base)            SVD_k: the k largest singular values with their vectors

Stage: alignment. Passes per step: 1, or none at all. Extra memory: where all parameters are trained, those of the start (of a given pair
no step, and one matrix of the base at a time beside the new weights); for an adapter none. Extra data: none, or with ``base`` the weights
before alignment.

It acts on what is aligned, hence at the end of this stage, and fine-tuning goes on from what it leaves, whichever method that has:

* without ``base`` the stage is plain SFT on the alignment set, and W_base is where it began, or for an adapter the bare base. Then
  W − W_base is the adapter's product a b (ours are ``[in, out]``), and since SVD_k(M) = M Vₖ Vₖᵀ the outcome is an adapter of the same
  rank: ``b ← b + α b Vₖ Vₖᵀ``, with Vₖ from an r × out matrix;
* with ``base`` the model of the stage is aligned already, and nothing is trained: it and the model before differ in whole matrices, so
  the outcome is a whole model (``align.train.full_parameters``), on which fine-tuning trains an adapter or all weights.

As in the public code (github.com/VITA-Group/LoX) every matrix counts, embedding and head too, and vectors stay. There k = 0 means all
singular values; here it is what the formula says, nothing, and all are any k from the smaller side on. The paper finds k for each model,
as the least that by itself brings back the safety of the aligned one: 6 for its Llama-2-7B, with α 1.25, which are the defaults.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Batches,
    Defence,
    Facts,
    Gradient,
    Params,
    RandomKey,
    Sets,
    Stage,
    check_not_negative,
)
from panacea_jax.defences.safety_vector import anew, unaligned_tensors
from panacea_jax.defences.sft import Sft
from panacea_jax.errors import InputError
from panacea_jax.models.adapter import Adapter
from panacea_jax.models.weights import load_layer


class LoxState(NamedTuple):
    """What LoX goes by, where that is not an adapter.

    Attributes:
        start: all weights before the first step; None where nothing is trained.
        moved: all weights moved on, of a given pair; None before the look at it.
    """

    start: Params | None = None
    moved: Params | None = None


@dataclasses.dataclass(frozen=True)
class Lox(Defence):
    """SFT, and at its end the aligned weights moved on.

    Attributes:
        k: singular values that count.
        alpha: α, how far.
        base: Hugging Face folder or hub id of the model before its alignment; "": it is aligned here.
    """

    k: int = 6
    alpha: float | int = 1.25
    base: str = ""

    stage: ClassVar[Stage] = "align"
    facts: ClassVar[Facts] = Facts(
        title="LoX",
        paper="arXiv 2506.15606",
        memory="with all parameters those of the start; of a given pair one matrix at a time",
        code="every matrix, as there; k 0 adds nothing, where there it adds all",
    )

    def __post_init__(self) -> None:
        check_not_negative(k=self.k, alpha=self.alpha)

    @property
    def at_once(self) -> bool:
        """Of a given pair nothing is trained."""
        return bool(self.base)

    @property
    def folders(self) -> tuple[str, ...] | None:
        """The model before its alignment, if that is not where the stage starts."""
        return (self.base,) if self.base else None

    def check(self, full_parameters: bool) -> None:
        """Raises:
        InputError: ``base`` is not a model, or an adapter is asked for, which cannot hold how two models differ.
        """
        if self.base:
            unaligned_tensors(self.base, self.facts.title)
            if not full_parameters:
                raise InputError(
                    f"config.defence.base = {self.base}: LoX of a given pair leaves a whole model; set train.full_parameters of its stage"
                )

    def init(self, params: Params) -> LoxState:
        """The weights of the start, where all are trained."""
        if self.base or isinstance(params, Adapter):
            return LoxState()
        return LoxState(start=jax.tree.map(jnp.copy, params))

    def first_pass(self, loss: Loss, params: Params, sets: Sets, state: LoxState) -> LoxState:
        """Of a given pair the outcome, one matrix after the other.

        Raises:
            InputError: ``base`` has not the same matrices, or is the aligned model.
        """
        if not self.base:
            return state
        tensors = unaligned_tensors(self.base, self.facts.title)
        differ = False

        def change(path: str, layer: int | None, w: Array, like: Array) -> Array:
            nonlocal differ
            if w.ndim < 2:
                return w
            before = load_layer(tensors, path, layer, like)
            differ = differ or bool((w != before).any())
            return _moved(w, before, self.k, self.alpha)

        moved = anew(params, change)
        if not differ:
            raise InputError(f"config.defence.base = {self.base}: is the aligned model; give the one before")
        return state._replace(moved=moved)

    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: LoxState, key: RandomKey
    ) -> Gradient:
        """``g = ∇ L_align(w)``."""
        return Sft().gradient(loss_fn, params, batches, state, key)

    def finish(self, params: Params, state: LoxState) -> Params:
        """``W + α SVD_k(W − W_base)``."""
        if isinstance(params, Adapter):
            return dataclasses.replace(params, layers=_moved_layers(params.layers, self.k, self.alpha))
        if state.moved is not None:
            return state.moved
        start = flatten_dict(state.start, sep="/")

        def change(path: str, layer: int | None, w: Array, _: Array) -> Array:
            before = start[path] if layer is None else start[path][layer]
            return w if w.ndim < 2 else _moved(w, before, self.k, self.alpha)

        return anew(params, change)


@functools.partial(jax.jit, static_argnames="k")
def _moved(w: Float[Array, "in out"], before: Float[Array, "in out"], k: int, alpha: float | Array) -> Float[Array, "in out"]:
    with jax.default_matmul_precision("highest"):
        u, s, v = jnp.linalg.svd(w - before, full_matrices=False)
        return w + alpha * ((u[:, :k] * s[:k]) @ v[:k])


@functools.partial(jax.jit, static_argnames="k")
def _moved_layers(layers: dict[str, Any], k: int, alpha: float | Array) -> dict[str, Any]:
    """b + α b Vₖ Vₖᵀ: the right vectors of a b are those of R b, with a = Q R."""
    out = jax.tree.map(lambda x: x, layers)
    with jax.default_matmul_precision("highest"):
        for pairs in out.values():
            for pair in pairs.values():
                a, b = pair["a"], pair["b"]
                v = jnp.linalg.svd(jnp.linalg.qr(a, mode="r") @ b, full_matrices=False)[2][:, :k]
                pair["b"] = b + alpha * jnp.einsum("lro,lko,lkp->lrp", b, v, v)
    return out
