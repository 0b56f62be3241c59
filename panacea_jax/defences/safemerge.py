"""SafeMERGE: where fine-tuning left the alignment's subspace, a safe adapter is merged in (arXiv 2503.17239, ACL 2026).

    Δ = W_aligned − W_base        P = Δ Δᵀ / ‖Δ‖_F        c = cos(P B A, B A)        ΔW ← (1 − w) ΔW + w ΔW_safe  where c < τ

Stage: post-fine-tuning, one shot. Passes: none. Extra memory: one matrix of the unaligned base at a time, and the safe adapter.
Extra data: the weights of the base before its alignment (``base``), and an adapter that was trained to be safe (``safe``).

c is Safe LoRA's, rounded to 5 decimals as there. ΔW is s B A with s = α/r. The public code (github.com/aladinD/SafeMERGE) merges by peft's
combination "linear", which does not add these products but the factors: √((1 − w) s) A + √(w s) A_safe, and B likewise. Its product has
the two terms of the equation and two more, of the one's B with the other's A. Two adapters that are alike, as one that went on from the
other is, so come out at up to 1.8 times their size (w 0.2), which no average does. Hence ``merge``: "products" is the equation, exactly,
in an adapter of both ranks; "factors" what the code computes, for adapters of one rank.

Defaults are the code's: τ 0.35, w 0.2. Its variant that drops and rescales entries (DARE) is left out.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import Facts, Method, Params, Sets, Stage
from panacea_jax.defences.safety_vector import projections, unaligned_tensors
from panacea_jax.errors import InputError
from panacea_jax.models.adapter import BLOCK_OF, Adapter
from panacea_jax.models.peft import load_adapter


class SafeMergeState(NamedTuple):
    """Outcome of the look at the models; empty before it.

    Attributes:
        cosine: c by projection, rounded to 5 decimals.
        safe: the safe adapter; None before the look.
    """

    cosine: dict[str, Float[np.ndarray, "S"]]
    safe: Adapter | None = None


@dataclasses.dataclass(frozen=True)
class SafeMerge(Method):
    """Merge a safe adapter into the modules that left the alignment's subspace.

    Attributes:
        base: Hugging Face folder or hub id of the model before its alignment.
        aligned: PEFT folder of an adapter that, merged into the model that is healed, makes the aligned one; "": the model itself is
            aligned. In a work directory it is found: the adapter that fine-tuning went on from.
        safe: PEFT folder of the safe adapter, of the same base and modules; "": the one that made the aligned model.
        threshold: τ; modules with a smaller cosine are merged, with -1 none.
        weight: w, share of the safe adapter.
        merge: "products" of both are averaged, or their "factors" are added as peft does.
    """

    base: str = ""
    aligned: str = ""
    safe: str = ""
    threshold: float | int = 0.35
    weight: float | int = 0.2
    merge: Literal["products", "factors"] = "products"

    stage: ClassVar[Stage] = "heal"
    facts: ClassVar[Facts] = Facts(
        title="SafeMERGE",
        paper="arXiv 2503.17239",
        memory="one matrix of the unaligned base at a time, the safe adapter",
        code="cosine, rounding and threshold reproduced; products merged, as the code's factors with merge factors",
    )

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise InputError(f"config.defence.threshold = {self.threshold}: a cosine between -1 and 1")
        if not 0 <= self.weight <= 1:
            raise InputError(f"config.defence.weight = {self.weight}: a share between 0 and 1")

    @property
    def folders(self) -> tuple[str, ...]:
        """The models that it reads; "" where none is named."""
        return self.base, self.aligned, self.safe

    def aligned_by(self, adapter: str) -> "SafeMerge":
        """Compares with the aligned model; what is said of it stays."""
        return dataclasses.replace(self, aligned=self.aligned or adapter)

    def check(self, full_parameters: bool) -> None:
        """Raises:
        InputError: all parameters are healed; ``base`` is not set, or not a model.
        """
        if full_parameters:
            raise InputError("config.defence.name = safemerge: merges adapters; config.train.full_parameters leaves none")
        unaligned_tensors(self.base, self.facts.title)

    def init(self, params: Params) -> SafeMergeState:
        """Nothing seen yet.

        Raises:
            InputError: all parameters are healed.
        """
        if not isinstance(params, Adapter):
            raise InputError("config.defence.name = safemerge: merges adapters, and there is none")
        return SafeMergeState({})

    def first_pass(
        self, loss: Loss, params: Adapter, sets: Sets, state: SafeMergeState
    ) -> SafeMergeState:
        """c of every module, one module after the other, and the safe adapter.

        Raises:
            InputError: ``base`` or the safe adapter is not set or does not fit.
        """
        folder = self.safe or self.aligned
        if not folder:
            raise InputError("config.defence.safe is not set: SafeMERGE needs the PEFT folder of a safe adapter")
        model = dataclasses.replace(loss.model, weights=loss.weights)
        safe = load_adapter(folder, model, frozen=True)
        self._check_fits(folder, safe, params)
        aligned = load_adapter(self.aligned, model, frozen=True) if self.aligned else None
        cosine: dict[str, list[float]] = {target: [] for target in params.targets}
        for module, found in projections(loss, params, self.base, aligned, self.facts.title):
            cosine[module.target].append(float(found.cosine))
        return SafeMergeState({target: np.round(found, 5) for target, found in cosine.items()}, safe)

    def _check_fits(self, folder: str, safe: Adapter, params: Adapter) -> None:
        """Raises:
        InputError: the safe adapter has not every module of the other or, where factors are added, another rank.
        """
        missing = [t for t in params.targets if t not in safe.targets] + [f"layer {n}" for n in params.adapted if n not in safe.adapted]
        if missing:
            raise InputError(f"config.defence.safe: {folder} does not adapt {missing[0]}, which is to be merged")
        if self.merge == "factors" and safe.rank != params.rank:
            raise InputError(f"config.defence.merge = factors: {folder} has rank {safe.rank}, the adapter that is healed {params.rank}")

    def finish(self, params: Adapter, state: SafeMergeState) -> Adapter:
        """``(1 − w) ΔW + w ΔW_safe`` where c < τ."""
        safe = state.safe
        assert safe is not None
        places = np.asarray([safe.place(layer) for layer in params.adapted])
        merged = _factors_of_sum if self.merge == "factors" else _of_both_ranks
        layers: dict[str, Any] = {}
        for target, cosine in state.cosine.items():
            own, other = (a.layers[BLOCK_OF[target]][target] for a in (params, safe))
            other = {factor: x[places] for factor, x in other.items()}
            chosen = np.where(cosine < self.threshold, float(self.weight), 0.0)
            layers.setdefault(BLOCK_OF[target], {})[target] = merged(own, other, chosen, safe.scale / params.scale)
        if self.merge == "factors":
            return dataclasses.replace(params, layers=layers)
        rank = params.rank + safe.rank
        return Adapter(layers, rank, params.scale * rank, numbers=params.numbers)

    def report(self, params: Adapter, state: SafeMergeState) -> dict[str, Any]:
        """Which modules were merged, and the cosines."""
        return {
            "threshold": float(self.threshold),
            "cosines": {t: c.tolist() for t, c in state.cosine.items()},
            "merged": {t: np.asarray(params.adapted)[c < self.threshold].tolist() for t, c in state.cosine.items()},
        }


_Pair = dict[str, Array]


def _of_both_ranks(own: _Pair, safe: _Pair, share: Float[np.ndarray, "S"], scale: float) -> _Pair:
    """``(1 − w) a b + w (s_safe / s) a_safe b_safe``, the ranks side by side."""
    w = jnp.asarray(share, own["b"].dtype)[:, None, None]
    return {
        "a": jnp.concatenate([own["a"], safe["a"]], axis=2),
        "b": jnp.concatenate([(1 - w) * own["b"], w * scale * safe["b"]], axis=1),
    }


def _factors_of_sum(own: _Pair, safe: _Pair, share: Float[np.ndarray, "S"], scale: float) -> _Pair:
    """``√(1 − w) a + √(w s_safe / s) a_safe``, and b likewise."""
    mine, other = (jnp.asarray(np.sqrt(x), own["b"].dtype)[:, None, None] for x in (1 - share, share * abs(scale)))
    return {"a": mine * own["a"] + math.copysign(1, scale) * other * safe["a"], "b": mine * own["b"] + other * safe["b"]}
