"""The adapter: low-rank factors of chosen projections, as one pytree (LoRA, Hu et al., arXiv 2106.09685).

An adapted projection computes ``y = x W + (α/r) (x A) B`` with float32 ``A [in, r]`` and ``B [r, out]``, stacked over layers like the
base weights. A defence treats the adapter like any other set of parameters.
"""

import dataclasses
import math
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
        layers: ``{"self_attn": {"q_proj": {"a": [L, in, r], "b": [L, r, out]}, …}, "mlp": {…}}``, chosen targets only.
        rank: r.
        alpha: α; the product is scaled by α/r.
        rslora: scaled by α/√r instead (Kalajdzievski, arXiv 2312.03732).
        dropout: probability with which an entry of an adapter's input is 0 in a training step; the others are divided by 1 − dropout.
    """

    layers: dict[str, Any]
    rank: int = dataclasses.field(metadata={"static": True})
    alpha: float = dataclasses.field(metadata={"static": True})
    rslora: bool = dataclasses.field(default=False, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def scale(self) -> float:
        """α/r, or α/√r."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def targets(self) -> tuple[str, ...]:
        """Adapted projections by their Hugging Face names, in the order of the table above."""
        return tuple(name for name, block in BLOCK_OF.items() if name in self.layers.get(block, {}))


class RowAdapters(NamedTuple):
    """Adapters of one base, one for each row of a batch.

    Attributes:
        layers: factors of all of them side by side, ``a [L, in, R]`` and ``b [L, R, out]``.
        scale: α/r on the ranks of the row's own adapter, 0 on the others'.
    """

    layers: dict[str, Any]
    scale: Float[Array, "B 1 R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterSet:
    """Several adapters of one base, with the ranks of all of them side by side.

    Attributes:
        layers: as of :class:`RowAdapters`; zeros for a projection that an adapter leaves alone.
        scale: α/r of the adapter that each rank belongs to.
        owner: its number.
    """

    layers: dict[str, Any]
    scale: Float[Array, "R"]
    owner: Int[Array, "R"]

    def of(self, which: Int[Array, "B"]) -> RowAdapters:
        """As seen by rows that use the adapters ``which``."""
        own = self.owner == which[:, None]
        return RowAdapters(self.layers, jnp.where(own, self.scale, 0.0)[:, None])


def side_by_side(adapters: Sequence[Adapter]) -> AdapterSet:
    """Several adapters as one set, numbered in their order."""
    layers: dict[str, Any] = {}
    for name in BLOCK_OF:
        having = [a.layers[BLOCK_OF[name]][name] for a in adapters if name in a.targets]
        if not having:
            continue
        parts = [
            a.layers[BLOCK_OF[name]][name]
            if name in a.targets
            else {
                "a": jnp.zeros((*having[0]["a"].shape[:2], a.rank)),
                "b": jnp.zeros((having[0]["b"].shape[0], a.rank, having[0]["b"].shape[2])),
            }
            for a in adapters
        ]
        layers.setdefault(BLOCK_OF[name], {})[name] = {
            "a": jnp.concatenate([p["a"] for p in parts], axis=2),
            "b": jnp.concatenate([p["b"] for p in parts], axis=1),
        }
    ranks = [a.rank for a in adapters]
    scale = np.repeat([a.scale for a in adapters], ranks).astype(np.float32)
    owner = np.repeat(np.arange(len(adapters)), ranks).astype(np.int32)
    return AdapterSet(layers, jnp.asarray(scale), jnp.asarray(owner))


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
        out["layers"][block][name]["kernel"] = jax.jit(merged, out_shardings=kernel.sharding)(
            kernel, adapter.layers[block][name], adapter.scale
        )
    return out
