"""Safe Delta: of what fine-tuning changed keep what costs safety least, and compensate for what is kept (arXiv 2505.12038, ICML 2025).

    Δ = W_tuned − W_aligned        H = 2/n Σ x xᵀ + damping · mean(diag H) · I        p_j = 1/U_jj²,  UᵀU = H⁻¹, U upper triangular
    K: the inputs j of lowest price p_j, as many as  Σ_{j∈K} p_j ‖Δ_j‖² ≤ s · mean_j p_j  allows
    W = W_aligned + Δ_K U_KK⁻¹ U_K

Stage: post-fine-tuning, one shot. Passes: one forward over the alignment set, and about as many FLOPs again for H. Extra memory: what the
alignment set is between two layers, H of one layer; with all parameters the healed weights and one layer of the aligned model. Extra
data: ``alignment``, and the aligned model.

W is a projection ``[out, in]`` (ours are transposes), x its inputs in the aligned model, prompts and answers, n the number of alignment
records; ½ tr(Δ H Δᵀ) is what a change costs. Keeping one entry δ costs δ²/(2 [H⁻¹]_jj) if its row is moved by δ [H⁻¹]_j / [H⁻¹]_jj
(optimal brain surgeon; the paper's Theorem 4.1), and is worth δ²: entries are kept in the order of [H⁻¹]_jj, largest first, until s is
spent. That order depends on the input alone. So whole inputs are kept, what is left of Δ is Δ times a matrix on the side of the inputs, and
**no rank is added**: ``B A`` becomes ``B A'``, which an adapter holds as it is. Where an adapter ``B₀ A₀`` aligned the base, Δ is
``B A − B₀ A₀``, and the outcome has the ranks of both.

``rule`` "code" is the public code's (github.com/ColinLu50/SafeDelta, after SparseGPT): input after input, each compensated by those behind
it, and [H⁻¹]_jj is that of itself and those, U_jj² (``Hinv`` there is the factor U; its square is no square of an inverse). "paper" is
§4 to the letter: p_j = 1/[H⁻¹]_jj, and the sum of all kept entries' moves, on the entries that are not kept.

Of the code are also kept the damping 0.01, a diagonal of 1 for inputs that are always 0, the 15 % of highest price that are never kept
(not in the paper's formula), and that all but the projections of the layers is the aligned model's again. It differs in this:

* s is the paper's, for each projection. The code's is that at 4096 × 4096 and grows with rows and columns.
* Inputs are chosen over a whole projection, by Δ as it was; in the code in each 2048 columns, by what those before left of it.
* The input at which s runs out is left out whole. The code keeps those of its entries that an unstable sort puts first.
* Each input is compensated by all behind it; in the code not by the rest of its group of four.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int

from panacea_jax.data.batches import Batch
from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Facts,
    Method,
    Params,
    Sets,
    Stage,
    StreamSpec,
    check_not_negative,
)
from panacea_jax.errors import InputError
from panacea_jax.models import head
from panacea_jax.models.adapter import BLOCK_OF, Adapter, widened
from panacea_jax.models.hub import local_folder
from panacea_jax.models.inputs import Inputs
from panacea_jax.models.peft import load_adapter
from panacea_jax.models.weights import find_tensors, load_layer
from panacea_jax.parallel.sharding import adapter_shardings, replicated

# Projections that have the inputs of another one.
_INPUTS_OF = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
_PRODUCTS = "input_products"

_Delta = Float[Array, "in out"]


class SafeDeltaState(NamedTuple):
    """Outcome of the look at both models; empty before it.

    Attributes:
        healed: what is deployed.
        kept: by projection, how many of its inputs are kept in each layer that it looked at.
        losses: ½ tr(Δ H Δᵀ) over all of them together, of what fine-tuning changed and of what is left.
    """

    healed: Params
    kept: dict[str, list[int]]
    losses: dict[str, float]


class KeptInputs(NamedTuple):
    """What is kept of a projection.

    Attributes:
        kept: the inputs K.
        factor: ``L = Uᵀ``, the lower Cholesky factor of H⁻¹.
        root: an upper triangular R with ``R Rᵀ = H``.
    """

    kept: Bool[Array, "in"]
    factor: Float[Array, "in in"]
    root: Float[Array, "in in"]


@dataclasses.dataclass(frozen=True)
class SafeDelta(Method):
    """Keep what fine-tuning changed where that is cheap, and compensate.

    Attributes:
        aligned: the aligned model: with all parameters its Hugging Face folder or hub id; else a PEFT folder that makes it of the base, ""
            where the base is aligned. In a work directory it is found: what fine-tuning went on from.
        budget: s; 0.1 in the paper, 0.1 and 0.11 in the code's scripts.
        damping: share of H's mean diagonal that is added to it.
        guarded: share of the inputs, those of highest price, that are never kept.
        rule: prices and compensation of the public code, or of the paper.
        compensate: False: what is not kept is the aligned model's as it was (the paper's ablation).
    """

    aligned: str = ""
    budget: float | int = 0.1
    damping: float | int = 0.01
    guarded: float | int = 0.15
    rule: Literal["code", "paper"] = "code"
    compensate: bool = True

    stage: ClassVar[Stage] = "heal"
    facts: ClassVar[Facts] = Facts(
        title="Safe Delta",
        paper="arXiv 2505.12038",
        memory="the alignment set between two layers, Gram matrices of one; all parameters: healed weights, an aligned layer",
        code="Hessian, prices, order and compensation reproduced; the paper's budget; by whole inputs, so that adapters can hold it",
    )

    def __post_init__(self) -> None:
        check_not_negative(budget=self.budget)
        if not 0 < self.damping < float("inf"):
            raise InputError(f"config.defence.damping = {self.damping}: a finite number above 0")
        if not 0 <= self.guarded <= 1:
            raise InputError(f"config.defence.guarded = {self.guarded}: a share between 0 and 1")

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """A forward pass over the alignment set."""
        return {"alignment": StreamSpec(whole_passes=1 / 2)}

    @property
    def compared(self) -> tuple[str, ...]:
        """The aligned model, where it is named."""
        return (self.aligned,) if self.aligned else ()

    def aligned_by(self, adapter: str) -> "SafeDelta":
        """Compares with the aligned model; what is said of it stays."""
        return dataclasses.replace(self, aligned=self.aligned or adapter)

    def init(self, params: Params) -> SafeDeltaState:
        """Nothing seen yet."""
        return SafeDeltaState(None, {}, {})

    def first_pass(self, loss: Loss, params: Params, sets: Sets, state: SafeDeltaState) -> SafeDeltaState:
        """Go through the aligned model layer by layer, and heal each.

        Raises:
            InputError: the aligned model is not named, cannot be used, or has not the same projections; H has no inverse in this dtype.
        """
        both: _Both = _Matrices(self, params) if isinstance(params, Mapping) else _Factors(self, loss, params)
        entered = [_enter(loss, both.outer, batch) for batch in sets["alignment"]]
        between, records = [x for x, _ in entered], sum(int(n) for _, n in entered)
        kept: dict[str, list[int]] = {}
        before, after = 0.0, 0.0
        for layer in range(both.depth):
            weights, place, targets = both.at(layer)
            products: dict[str, Any] = {}
            for i, batch in enumerate(sets["alignment"]):
                between[i], found = _through(loss, weights, between[i], batch, layer, place, bool(targets))
                products = jax.tree.map(jnp.add, products, found) if products else found
            for target in targets:
                delta = both.delta(layer, target)
                selection = select(self, products[_INPUTS_OF.get(target, target)], records, delta)
                if not bool(jnp.isfinite(selection.factor).all()):
                    raise InputError(
                        f"config.defence.damping = {self.damping}: H of {target} in layer {layer} has no Cholesky factor in {delta.dtype}; "
                        "a larger one gives it one"
                    )
                left = carry(self, selection, delta)
                both.heal(layer, target, selection, left)
                kept.setdefault(target, []).append(int(selection.kept.sum()))
                before += float(_safety_loss(selection, delta))
                after += float(_safety_loss(selection, left))
        return SafeDeltaState(both.healed(), kept, {"tuned": before, "healed": after})

    def finish(self, params: Params, state: SafeDeltaState) -> Params:
        """The healed weights."""
        return state.healed

    def report(self, params: Params, state: SafeDeltaState) -> dict[str, Any]:
        """How many inputs of each projection are kept, layer by layer, and the safety loss before and after."""
        return {"kept_inputs": state.kept, "safety_loss": state.losses}


def select(method: SafeDelta, products: Float[Array, "in in"], records: int, delta: _Delta) -> KeptInputs:
    """``K``, and what it is compensated by.

    Args:
        method: its numbers.
        products: Σ x xᵀ over the tokens of all records.
        records: n.
        delta: Δ of one projection.
    """
    most = len(delta) - int(method.guarded * len(delta))
    return _select(products, records, delta, float(method.budget), float(method.damping), most, method.rule)


# Numbers are no part of the program: one serves all budgets.
@functools.partial(jax.jit, static_argnames="rule")
def _select(
    products: Float[Array, "in in"],
    records: Int[Array, ""] | int,
    delta: _Delta,
    budget: Float[Array, ""] | float,
    damping: Float[Array, ""] | float,
    most: Int[Array, ""] | int,
    rule: str,
) -> KeptInputs:
    n = len(delta)
    h = 2 * products.astype(delta.dtype) / records
    diagonal = jnp.where(jnp.diagonal(h) == 0, 1, jnp.diagonal(h))
    h = h.at[jnp.diag_indices(n)].set(diagonal + damping * jnp.mean(diagonal))
    # H = R Rᵀ by the factor of H turned round, and UᵀU = H⁻¹ with U = R⁻¹: no inverse is factorised.
    root = jax.lax.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    factor = jax.scipy.linalg.solve_triangular(root, jnp.eye(n, dtype=h.dtype)).T
    prices = 1 / (jnp.square(jnp.diagonal(factor)) if rule == "code" else _diagonal(factor))
    order = jnp.argsort(prices, stable=True)
    spent = jnp.cumsum((prices * jnp.sum(jnp.square(delta), axis=1))[order])
    first = (spent <= budget * jnp.mean(prices)) & (jnp.arange(n) < most)
    return KeptInputs(jnp.zeros(n, bool).at[order].set(first), factor, root)


def carry(method: SafeDelta, selection: KeptInputs, x: Float[Array, "in k"]) -> Float[Array, "in k"]:
    """What is left of Δ, or of a left factor of it: ``x`` itself on the kept inputs, on the others what compensates for that."""
    return _carry(selection, x, method.rule if method.compensate else "none")


@functools.partial(jax.jit, static_argnames="how")
def _carry(selection: KeptInputs, x: Float[Array, "in k"], how: str) -> Float[Array, "in k"]:
    kept, factor = selection.kept[:, None], selection.factor.astype(x.dtype)
    x = jnp.where(kept, x, 0)
    if how == "none":
        return x
    with jax.default_matmul_precision("highest"):
        if how == "paper":
            moves = factor @ (factor.T @ (x / _diagonal(factor)[:, None]))
        else:
            # L_KK with ones in place of the others: what it solves for is zero there.
            inner = jnp.where(kept & kept.T, factor, jnp.eye(len(x), dtype=x.dtype))
            moves = factor @ jax.scipy.linalg.solve_triangular(inner, x, lower=True)
    return jnp.where(kept, x, moves)


def _diagonal(factor: Float[Array, "in in"]) -> Float[Array, "in"]:
    """[H⁻¹]_jj."""
    return jnp.sum(jnp.square(factor), axis=1)


@jax.jit
def _safety_loss(selection: KeptInputs, delta: _Delta) -> Float[Array, ""]:
    """``½ tr(Δ H Δᵀ)``."""
    with jax.default_matmul_precision("highest"):
        return jnp.sum(jnp.square(selection.root.T @ delta)) / 2


@jax.jit
def _enter(loss: Loss, outer: Any, batch: Batch) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """What enters the first layer, and the number of records."""
    return loss.bind(outer).embed(batch.tokens), batch.records


@functools.partial(jax.jit, static_argnames="look")
def _through(
    loss: Loss,
    weights: Any,
    x: Float[Array, "B T D"],
    batch: Batch,
    layer: Int[Array, ""] | int,
    place: Int[Array, ""] | int,
    look: bool,
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "_in _in"]]]:
    """What leaves a layer of the aligned model, and by projection ``Σ x xᵀ`` of its inputs where it is looked at."""
    inputs = Inputs.of(batch.tokens, batch.valid, segments=batch.segments, right=True)
    x, found = loss.bind(weights).one_layer(x, inputs, layer, place, (_PRODUCTS,) if look else ())
    products = {name.rpartition(".")[2]: h for name, h in found.get(_PRODUCTS, {}).items()}
    # Of what has the same inputs once; whole on every device, as their factors will be.
    own = {target: h for target, h in products.items() if target not in _INPUTS_OF}
    return x, jax.lax.with_sharding_constraint(own, replicated(loss.model.mesh))


class _Both(Protocol):
    """The aligned and the tuned model, layer by layer."""

    depth: int
    outer: Any  # weights of the aligned model that hold its embedding

    def at(self, layer: int) -> tuple[Any, int, tuple[str, ...]]:
        """The aligned model's weights, the layer's place in their stacks, and the projections that are looked at."""

    def delta(self, layer: int, target: str) -> _Delta:
        """What fine-tuning changed."""

    def heal(self, layer: int, target: str, selection: KeptInputs, left: _Delta) -> None:
        """Put what is left in the place of what fine-tuning changed."""

    def healed(self) -> Params:
        """All that was healed."""


class _Matrices:
    """All parameters: projections are matrices, and the aligned model is read layer by layer."""

    def __init__(self, method: SafeDelta, params: Params) -> None:
        if not method.aligned:
            raise InputError(
                "config.defence.aligned is not set: Safe Delta needs the model that fine-tuning went on from"
            )
        self._stacks = flatten_dict(params["layers"], sep="/")
        others = flatten_dict({k: v for k, v in params.items() if k != "layers"}, sep="/")
        try:
            found = find_tensors(local_folder(method.aligned))
            self._tensors = head.by_embedding(found, {path: x.shape for path, x in others.items()})
            loaded = {path: load_layer(self._tensors, path, None, x) for path, x in others.items()}
        except InputError as error:
            raise InputError(f"config.defence.aligned = {method.aligned}: {error}") from error
        self._method = method
        self._others = unflatten_dict(loaded, sep="/")
        self.outer = self._others | {"layers": params["layers"]}
        self.depth = len(next(iter(self._stacks.values())))
        self._healed: dict[str, list[Array]] = {path: [] for path in self._stacks}

    def at(self, layer: int) -> tuple[Any, int, tuple[str, ...]]:
        try:
            for path, stack in self._stacks.items():
                self._healed[path].append(load_layer(self._tensors, f"layers/{path}", layer, stack))
        except InputError as error:
            raise InputError(f"config.defence.aligned = {self._method.aligned}: {error}") from error
        own = {path: found[-1][None] for path, found in self._healed.items()}
        return self._others | {"layers": unflatten_dict(own, sep="/")}, 0, tuple(BLOCK_OF)

    def delta(self, layer: int, target: str) -> _Delta:
        path = _path(target)
        return self._stacks[path][layer] - self._healed[path][layer]

    def heal(self, layer: int, target: str, selection: KeptInputs, left: _Delta) -> None:
        path = _path(target)
        aligned, tuned = self._healed[path][layer], self._stacks[path][layer]
        self._healed[path][layer] = jnp.where(selection.kept[:, None], tuned, aligned + left)

    def healed(self) -> Params:
        layers = {path: _stack(self._healed.pop(path), like) for path, like in self._stacks.items()}
        return self._others | {"layers": unflatten_dict(layers, sep="/")}


class _Factors:
    """An adapter, of a base that is aligned or that another adapter aligns."""

    def __init__(self, method: SafeDelta, loss: Loss, params: Adapter) -> None:
        model = dataclasses.replace(loss.model, weights=loss.weights)
        self._method, self._tuned, self._mesh = method, params, model.mesh
        self.outer = load_adapter(method.aligned, model, frozen=True) if method.aligned else None
        modules = {(a.targets, a.adapted) for a in (params, self.outer) if a is not None}
        if len(modules) > 1:
            raise InputError(
                f"config.defence.aligned = {method.aligned}: adapts other projections or layers than the adapter that is healed"
            )
        self.depth = params.adapted[-1] + 1
        self._pairs: dict[str, list[tuple[Array, Array]]] = {target: [] for target in params.targets}

    def at(self, layer: int) -> tuple[Any, int, tuple[str, ...]]:
        return self.outer, layer, () if self._tuned.place(layer) is None else self._tuned.targets

    def _of(self, adapter: Adapter, layer: int, target: str) -> tuple[Array, Array]:
        pair, place = adapter.layers[BLOCK_OF[target]][target], self._tuned.adapted.index(layer)
        return pair["a"][place], pair["b"][place]

    def delta(self, layer: int, target: str) -> _Delta:
        with jax.default_matmul_precision("highest"):
            a, b = self._of(self._tuned, layer, target)
            delta = self._tuned.scale * (a @ b)
            if self.outer is None:
                return delta
            a, b = self._of(self.outer, layer, target)
            return delta - self.outer.scale * (a @ b)

    def heal(self, layer: int, target: str, selection: KeptInputs, left: _Delta) -> None:
        a, b = self._of(self._tuned, layer, target)
        a = carry(self._method, selection, a)
        if self.outer is not None:
            start, out = self._of(self.outer, layer, target)
            a = jnp.concatenate([a, start - carry(self._method, selection, start)], axis=1)
            b = jnp.concatenate([b, self.outer.scale / self._tuned.scale * out])
        self._pairs[target].append((a, b))

    def healed(self) -> Params:
        layers: dict[str, Any] = {}
        for target, pairs in self._pairs.items():
            a, b = (jnp.stack(factors) for factors in zip(*pairs))
            layers.setdefault(BLOCK_OF[target], {})[target] = {"a": a, "b": b}
        layers = jax.device_put(layers, adapter_shardings(self._mesh, layers))
        return dataclasses.replace(widened(self._tuned, a.shape[2]), layers=layers)


def _path(target: str) -> str:
    return f"{BLOCK_OF[target]}/{target}/kernel"


def _stack(layers: list[Array], like: Array) -> Array:
    stacked: Array = jax.jit(lambda xs: jnp.stack(xs), out_shardings=like.sharding)(layers)
    return stacked
