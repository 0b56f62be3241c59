"""The adapter: low-rank factors of chosen projections, as one pytree (LoRA, Hu et al., arXiv 2106.09685).

An adapted projection computes ``y = x W + (α/r) (x A) B`` with float32 ``A [in, r]`` and ``B [r, out]``, stacked over layers like the
base weights. A defence treats the adapter like any other set of parameters.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from panacea_jax.errors import InputError
from panacea_jax.models.precision import wide
from panacea_jax.models.quantise import whole

BLOCK_OF = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA factors of every chosen projection.

    Attributes:
        layers: ``{"self_attn": {"q_proj": {"a": [S, in, r], "b": [S, r, out]}, …}, "mlp": {…}}``, chosen targets only.
        rank: r.
        alpha: α; the product is scaled by α/r.
        rslora: scaled by α/√r instead (Kalajdzievski, arXiv 2312.03732).
        dropout: probability with which an entry of an adapter's input is 0 in a training step; the others are divided by 1 − dropout.
        numbers: of the S layers that are adapted, rising; None: all of the model.
    """

    layers: dict[str, Any]
    rank: int = dataclasses.field(metadata={"static": True})
    alpha: float = dataclasses.field(metadata={"static": True})
    rslora: bool = dataclasses.field(default=False, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    numbers: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def scale(self) -> float:
        """α/r, or α/√r."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def targets(self) -> tuple[str, ...]:
        """Adapted projections by their Hugging Face names, in the order of the table above."""
        return tuple(name for name, block in BLOCK_OF.items() if name in self.layers.get(block, {}))

    @property
    def width(self) -> int:
        """D, the size of the model's hidden states: what goes into q, k, v, gate and up, and comes out of o and down."""
        name = self.targets[0]
        pair = self.layers[BLOCK_OF[name]][name]
        return int(pair["b"].shape[2] if name in ("o_proj", "down_proj") else pair["a"].shape[1])

    @property
    def lowest(self) -> int:
        """The lowest layer that is adapted: what enters it does not depend on the adapter."""
        return 0 if self.numbers is None else self.numbers[0]

    @property
    def adapted(self) -> tuple[int, ...]:
        """Numbers of the layers that the stacks hold, one after the other."""
        depth = jax.tree.leaves(self.layers)[0].shape[0]
        return tuple(range(depth)) if self.numbers is None else self.numbers

    def place(self, layer: int) -> int | None:
        """Where in the stacks a layer of the model is; None where it is not adapted."""
        return self.adapted.index(layer) if layer in self.adapted else None


def widened(adapter: Adapter, rank: int) -> Adapter:
    """The same adapter with further ranks, of zeros, up to ``rank``."""

    def wider(path: Any, x: jax.Array) -> jax.Array:
        axis = 2 if path[-1].key == "a" else 1
        return jnp.pad(x, [(0, rank - adapter.rank if i == axis else 0) for i in range(3)])

    alpha = adapter.scale * (math.sqrt(rank) if adapter.rslora else rank)
    layers = jax.tree.map_with_path(wider, adapter.layers)
    return dataclasses.replace(adapter, layers=layers, rank=rank, alpha=alpha)


class RowAdapters(NamedTuple):
    """Adapters of one base, one for each row of a batch.

    Attributes:
        layers: factors of all of them side by side, ``a [S, in, R]`` and ``b [S, R, out]``.
        scale: α/r on the ranks of the row's own adapter, 0 on the others'.
        numbers: as of :class:`Adapter`.
    """

    layers: dict[str, Any]
    scale: Float[Array, "B 1 R"]
    numbers: tuple[int, ...] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterSet:
    """Several adapters of one base, with the ranks of all of them side by side.

    Attributes:
        layers: as of :class:`RowAdapters`; zeros for a projection or a layer that an adapter leaves alone.
        scale: α/r of the adapter that each rank belongs to.
        owner: its number.
        numbers: of the layers that any of them adapts, as of :class:`Adapter`.
    """

    layers: dict[str, Any]
    scale: Float[Array, "R"]
    owner: Int[Array, "R"]
    numbers: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def of(self, which: Int[Array, "B"]) -> RowAdapters:
        """As seen by rows that use the adapters ``which``."""
        own = self.owner == which[:, None]
        return RowAdapters(self.layers, jnp.where(own, self.scale, 0.0)[:, None], self.numbers)


def spread(layers: Mapping[str, Any], numbers: Sequence[int] | None, wanted: Sequence[int]) -> dict[str, Any]:
    """Stacks of the layers ``wanted``, from stacks of the layers ``numbers`` (None: the same), with zeros for those that are not there."""
    if numbers is None or tuple(numbers) == tuple(wanted):
        return dict(layers)
    places = np.asarray([list(wanted).index(n) for n in numbers])

    def put(x: jax.Array) -> jax.Array:
        return jnp.zeros((len(wanted), *x.shape[1:]), x.dtype).at[places].set(x)

    return jax.tree.map(put, dict(layers))


def side_by_side(adapters: Sequence[Adapter]) -> AdapterSet:
    """Several adapters as one set, numbered in their order."""
    numbers = tuple(sorted(set().union(*(a.adapted for a in adapters))))
    stacks = [spread(a.layers, a.numbers, numbers) for a in adapters]
    layers: dict[str, Any] = {}
    for name, block in BLOCK_OF.items():
        having = next((s[block][name] for s, a in zip(stacks, adapters) if name in a.targets), None)
        if having is None:
            continue
        (depth, d_in, _), d_out = having["a"].shape, having["b"].shape[2]
        parts = [
            s[block][name]
            if name in a.targets
            else {"a": jnp.zeros((depth, d_in, a.rank)), "b": jnp.zeros((depth, a.rank, d_out))}
            for s, a in zip(stacks, adapters)
        ]
        layers.setdefault(block, {})[name] = {
            "a": jnp.concatenate([p["a"] for p in parts], axis=2),
            "b": jnp.concatenate([p["b"] for p in parts], axis=1),
        }
    ranks = [a.rank for a in adapters]
    scale = np.repeat([a.scale for a in adapters], ranks).astype(np.float32)
    owner = np.repeat(np.arange(len(adapters)), ranks).astype(np.int32)
    everywhere = any(a.numbers is None for a in adapters)
    return AdapterSet(layers, jnp.asarray(scale), jnp.asarray(owner), None if everywhere else numbers)


def sum_of_products(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """One adapter that adds ``Σ weight · (α/r) A B`` of several of one base: of the ranks of all together, at the scale of the first, with
    the factors of the first in front."""
    together, scale = side_by_side(adapters), adapters[0].scale
    share = np.repeat([w * a.scale / scale for w, a in zip(weights, adapters)], [a.rank for a in adapters])

    def weighted(pair: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {"a": pair["a"], "b": pair["b"] * jnp.asarray(share, pair["b"].dtype)[:, None]}

    layers = {block: {name: weighted(pair) for name, pair in pairs.items()} for block, pairs in together.layers.items()}
    return Adapter(layers, len(share), scale * len(share), numbers=together.numbers)


def as_wide_as(adapter: Adapter, other: Adapter) -> Adapter:
    """The adapter in the shape of another of its scale that has at least its ranks, projections and layers, with zeros for the rest."""

    def put(own: jax.Array | None, x: jax.Array) -> jax.Array:
        zeros = jnp.zeros_like(x)
        if own is None:
            return zeros
        places = np.asarray([other.adapted.index(n) for n in adapter.adapted])
        return zeros.at[places, : own.shape[1], : own.shape[2]].set(own)

    layers = {
        block: {
            name: {factor: put(adapter.layers.get(block, {}).get(name, {}).get(factor), x) for factor, x in pair.items()}
            for name, pair in pairs.items()
        }
        for block, pairs in other.layers.items()
    }
    return dataclasses.replace(other, layers=layers)


def layers_text(layers: Any) -> str:
    """One spelling of ``config.lora.layers``, which numbers may have several of: (20, 21), (20.0, 21.0) and "20,21" are one."""
    several = layers if isinstance(layers, list | tuple) else (layers,)
    return ",".join(x if isinstance(x, str) else f"{x:g}" for x in several).replace(" ", "")


def layer_numbers(layers: Any, depth: int) -> tuple[int, ...] | None:
    """What ``config.lora.layers`` means for a model of so many layers; None: all of them.

    Args:
        layers: "" or () for all, "upper:K" for the last K, "A-B" for those from A to B, or their numbers, counted from 0.
        depth: of the model.

    Raises:
        InputError: another form, or a layer that the model does not have.
    """
    words = layers_text(layers)
    if not words:
        return None
    if upper := re.fullmatch(r"upper:(\d+)", words):
        found: Sequence[int] = range(depth - int(upper[1]), depth)
    elif span := re.fullmatch(r"(\d+)-(\d+)", words):
        found = range(int(span[1]), int(span[2]) + 1)
    elif re.fullmatch(r"\d+(,\d+)*", words):
        found = sorted(set(map(int, words.split(","))))
    else:
        found = ()
    if not found:
        raise InputError(f'config.lora.layers = {layers!r}: "upper:10", "20-29", numbers of layers, or "" for all')
    if found[0] < 0 or found[-1] >= depth:
        raise InputError(f"config.lora.layers = {layers!r}: the model has the layers 0 to {depth - 1}")
    return None if len(found) == depth else tuple(found)


def target_names(targets: Sequence[object]) -> tuple[str, ...]:
    """Full names of the projections: ``q`` and ``q_proj`` both mean ``q_proj``.

    Raises:
        InputError: the list is empty or a name is unknown.
    """
    names = {t if t.endswith("_proj") else f"{t}_proj" for t in map(str, targets)}
    unknown = sorted(names - set(BLOCK_OF))
    if unknown or not names:
        known = ", ".join(name.removesuffix("_proj") for name in BLOCK_OF)
        raise InputError(f"config.lora.targets: {unknown or 'empty'}; choose from {known}")
    return tuple(name for name in BLOCK_OF if name in names)


def merged(kernel: jax.Array, pair: Mapping[str, jax.Array], scale: float | jax.Array) -> jax.Array:
    """``W + (α/r) A B`` of one layer or of all, summed in float32 and cast back to W's dtype."""
    dtype = wide(kernel.dtype)
    delta = jnp.matmul(pair["a"].astype(dtype), pair["b"].astype(dtype), precision="highest")
    return (kernel.astype(dtype) + scale * delta).astype(kernel.dtype)


def merge(weights: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Base weights with :func:`merged` kernels."""
    out = jax.tree.map(lambda x: x, dict(weights))
    for name in adapter.targets:
        block = BLOCK_OF[name]
        kernel = whole(out["layers"][block][name]["kernel"], "merging an adapter")
        pair = spread(adapter.layers[block][name], adapter.numbers, range(len(kernel)))
        out["layers"][block][name]["kernel"] = jax.jit(merged, out_shardings=kernel.sharding)(
            kernel, pair, adapter.scale
        )
    return out
