"""AsFT: fine-tuning whose changes are held to the direction of alignment (arXiv 2506.08473, AAAI 2026).

    min_w  L_task(w) + λ Σ ‖(I − Ĉ) ΔW‖²          Ĉ = V Vᵀ / ‖V‖_F,  V = W_aligned − W_base

Stage: fine-tuning. Passes per step: 1. Extra memory: the starting parameters w₀, and V of every module in the dtype of what is trained,
as large as the module's matrix (in checkpoints too). Extra data: none, but the weights of the base before its alignment (``base``).

The sum is over the adapted projections; of all weights, over the projections of all layers. W_aligned is the model that fine-tuning
starts from, and ΔW what it has changed of it: for a fresh adapter the paper's B A, and for one that alignment left (``lora.policy``
"single") B A − B₀ A₀; of all weights W − W₀. Ĉ is Safe LoRA's, neither idempotent nor free of scale, as in the paper's approximation and
its public code (github.com/PKU-YuanGroup/AsFT). No d × d matrix is formed for an adapter: with V transposed like all our matrices and
divided by √‖V‖_F, ``b (I − Ĉ) = b − (b Vᵀ) V``, and ‖a x‖² = Σ (aᵀa) ∘ (x xᵀ) has r × r matrices only. All weights cannot do without:
each matrix costs four products of the smaller of in × in and out × out with it, which the one pass that is stated does not count.

Open in the paper, and how it is read here: ΔW is B A without the factor α/r, as in the public code, so that λ means as much there and
here; all weights, on which the code has no penalty, take W − W₀; a module that alignment left as it was, where Ĉ is 0/0, is left free.
Not reproduced: the code counts the term once a micro-batch beside a loss that is divided by their number, and matches modules by order.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Batches,
    Defence,
    Facts,
    Gradient,
    LikeWeights,
    LossFn,
    Params,
    RandomKey,
    Sets,
    Stage,
    check_not_negative,
)
from panacea_jax.defences.safety_vector import shifts, unaligned_tensors
from panacea_jax.errors import InputError
from panacea_jax.models.adapter import BLOCK_OF, Adapter


class AsftState(NamedTuple):
    """What AsFT compares with.

    Attributes:
        start: w₀, the trainable tree at the start.
        direction: V / √‖V‖_F of every module, ``{"self_attn": {"q_proj": {"kernel": [S, in, out]}}, …}``; zeros before the look.
        counts: by projection, 1 for a layer of which alignment changed it and 0 for any other.
    """

    start: Params
    direction: LikeWeights
    counts: dict[str, Float[Array, "S"]]


@dataclasses.dataclass(frozen=True)
class Asft(Defence):
    """The gradient of the task loss and of the change that leaves the alignment's direction.

    Attributes:
        lam: λ, weight of the squared norm.
        base: Hugging Face folder or hub id of the model before its alignment.
    """

    lam: float | int = 1.0
    base: str = ""

    stage: ClassVar[Stage] = "finetune"
    facts: ClassVar[Facts] = Facts(
        title="AsFT",
        paper="arXiv 2506.08473",
        memory="starting parameters, one matrix as large as its own for every module",
        code="Ĉ and B A without α/r reproduced; modules matched by name; no d×d matrix for an adapter",
    )

    def __post_init__(self) -> None:
        check_not_negative(lam=self.lam)

    @property
    def folders(self) -> tuple[str, ...]:
        """The model before its alignment; "" where none is named."""
        return (self.base,)

    def check(self, full_parameters: bool) -> None:
        """Raises:
        InputError: ``base`` is not set, or not a model.
        """
        unaligned_tensors(self.base, self.facts.title)

    def init(self, params: Params) -> AsftState:
        """w₀ = w, and no direction yet."""
        shapes = dict(_shapes(params))
        direction: dict[str, Any] = {}
        for target, (shape, dtype) in shapes.items():
            direction.setdefault(BLOCK_OF[target], {})[target] = {"kernel": jnp.zeros(shape, dtype)}
        counts = {target: jnp.zeros(shape[0], dtype) for target, (shape, dtype) in shapes.items()}
        return AsftState(jax.tree.map(jnp.copy, params), LikeWeights(direction), counts)

    def first_pass(self, loss: Loss, params: Params, sets: Sets, state: AsftState) -> AsftState:
        """V of every module, one matrix of the model before after the other.

        Raises:
            InputError: ``base`` is not set, has not the same matrices, or is the aligned model.
        """
        adapter = params if isinstance(params, Adapter) else None
        weights = params if adapter is None else loss.weights
        title, tensors = self.facts.title, unaligned_tensors(self.base, self.facts.title)
        direction: dict[str, Any] = {}
        counts = {}
        for target, count in state.counts.items():
            layers = range(len(count)) if adapter is None else adapter.adapted
            found = [_scaled(shift.delta) for shift in shifts(weights, (target,), layers, tensors, title, count.dtype, adapter)]
            place = weights["layers"][BLOCK_OF[target]][target]["kernel"].sharding
            stacked = jax.jit(lambda *each: jnp.stack(each), out_shardings=place)(*(v for v, _ in found))
            direction.setdefault(BLOCK_OF[target], {})[target] = {"kernel": stacked}
            counts[target] = jnp.stack([size > 0 for _, size in found]).astype(count.dtype)
        if not any(bool(count.any()) for count in counts.values()):
            raise InputError(f"config.defence.base = {self.base}: is the model that fine-tuning starts from; give the one before")
        return state._replace(direction=LikeWeights(direction), counts=counts)

    def _penalty(self, params: Params, state: AsftState) -> Float[Array, ""]:
        """``λ Σ ‖(I − Ĉ) ΔW‖²``."""
        total = jnp.zeros(())
        for target, count in state.counts.items():
            v = state.direction.tree[BLOCK_OF[target]][target]["kernel"]
            total = total + jnp.sum(count * _squared(params, state.start, target, v))
        return self.lam * total

    def gradient(
        self, loss_fn: LossFn, params: Params, batches: Batches, state: AsftState, key: RandomKey
    ) -> Gradient:
        """``∇ [L_task(w) + λ Σ ‖(I − Ĉ) ΔW‖²]``."""
        loss, g = jax.value_and_grad(loss_fn)(params, batches["user"])
        penalty, p = jax.value_and_grad(self._penalty)(params, state)
        return jax.tree.map(jnp.add, g, p), state, {"loss": loss, "penalty": penalty}


def _shapes(params: Params) -> Iterator[tuple[str, tuple[tuple[int, ...], Any]]]:
    """Shape and dtype of the matrices of every module, stacked, by projection."""
    if isinstance(params, Adapter):
        for target in params.targets:
            a, b = (params.layers[BLOCK_OF[target]][target][factor] for factor in "ab")
            yield target, ((*a.shape[:2], b.shape[2]), b.dtype)
        return
    for target, block in BLOCK_OF.items():
        kernel = params["layers"][block][target]["kernel"]
        yield target, (kernel.shape, kernel.dtype)


@jax.jit
def _scaled(v: Float[Array, "in out"]) -> tuple[Float[Array, "in out"], Float[Array, ""]]:
    """V / √‖V‖_F, so that Ĉ is its product with itself, and ‖V‖_F."""
    size = jnp.linalg.norm(v)
    return v / jnp.sqrt(jnp.where(size > 0, size, 1)), size


def _squared(params: Params, start: Params, target: str, v: Float[Array, "S in out"]) -> Float[Array, "S"]:
    """‖(I − Ĉ) ΔW‖² of every layer of a projection."""
    now, then = (tree.layers if isinstance(tree, Adapter) else tree["layers"] for tree in (params, start))
    now, then = now[BLOCK_OF[target]][target], then[BLOCK_OF[target]][target]
    with jax.default_matmul_precision("highest"):
        if not isinstance(params, Adapter):
            return jnp.sum(jnp.square(_off(now["kernel"] - then["kernel"], v)), axis=(1, 2))
        # a b − a₀ b₀ as a product of rank 2r in which nothing large is taken from something as large.
        a = jnp.concatenate([now["a"] - then["a"], then["a"]], axis=2)
        b = jnp.concatenate([now["b"], now["b"] - then["b"]], axis=1)
        off = _off(b, v)
        return jnp.sum(jnp.einsum("lir,lis->lrs", a, a) * jnp.einsum("lro,lso->lrs", off, off), axis=(1, 2))


def _off(x: Float[Array, "S n out"], v: Float[Array, "S in out"]) -> Float[Array, "S n out"]:
    """``x (I − Ĉ)``; the order of the two products is that of the fewer operations."""
    return x - jnp.einsum("lno,lio,lip->lnp", x, v, v)
