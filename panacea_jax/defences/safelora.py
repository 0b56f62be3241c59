"""Safe LoRA: project an adapter's B onto what alignment changed, where the two disagree (arXiv 2405.16833).

    Δ = W_aligned − W_base        P = Δ Δᵀ / ‖Δ‖_F        c = cos(P B A, B A)        B ← P B  where c ≤ τ

Stage: post-fine-tuning, one shot. Passes: none. Extra memory: one matrix of the unaligned base at a time, and one projected B a module.
Extra data: none, but the weights of the base before its alignment (``base``).

A is never changed. P is neither idempotent nor free of scale: it divides by ‖Δ‖_F, not by its square; that is the fast variant of the
paper and what its public code (github.com/IBM/SafeLoRA) does. That code matches modules by their order and tells B by its shape; here
both go by name. The out × out matrix P is never formed: ``P B = Δ (Δᵀ B) / ‖Δ‖_F``, and c follows from r × r matrices.
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import Facts, Method, Params, Sets, Stage
from panacea_jax.defences.safety_vector import projections, unaligned_tensors
from panacea_jax.errors import InputError
from panacea_jax.models.adapter import BLOCK_OF, Adapter
from panacea_jax.models.peft import load_adapter


class SafeLoraState(NamedTuple):
    """Outcome of the look at both models, by projection; empty before it.

    Attributes:
        projected: ``P B`` in our orientation.
        cosine: c, rounded to 5 decimals.
    """

    projected: dict[str, Float[Array, "L r out"]]
    cosine: dict[str, Float[np.ndarray, "L"]]


@dataclasses.dataclass(frozen=True)
class SafeLora(Method):
    """Project the B of modules that left the alignment's subspace.

    Attributes:
        base: Hugging Face folder or hub id of the model before its alignment.
        aligned: PEFT folder of an adapter that, merged into the model that is healed, makes the aligned one; "": the model itself is
            aligned. In a work directory it is found: the adapter that fine-tuning went on from.
        select: "threshold": τ is ``threshold``; "number" (the public code's default): τ is the ``num_layers``-th smallest c, so that
            ties may add modules.
        threshold: τ.
        num_layers: number of modules to project.
    """

    base: str = ""
    aligned: str = ""
    select: Literal["threshold", "number"] = "number"
    threshold: float | int = 0.5
    num_layers: int = 10

    stage: ClassVar[Stage] = "heal"
    facts: ClassVar[Facts] = Facts(
        title="Safe LoRA",
        paper="arXiv 2405.16833",
        memory="one matrix of the unaligned base at a time, one projected B a module",
        code="projection, rounding and selection reproduced; modules matched by name, not by order",
    )

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise InputError(
                f"config.defence.threshold = {self.threshold}: a cosine between -1 and 1"
            )
        if self.num_layers < 1:
            raise InputError(f"config.defence.num_layers = {self.num_layers}: 1 or more")

    @property
    def folders(self) -> tuple[str, str]:
        """The models that it reads; "" where none is named."""
        return self.base, self.aligned

    def aligned_by(self, adapter: str) -> "SafeLora":
        """Compares with the aligned model; what is said of it stays."""
        return dataclasses.replace(self, aligned=self.aligned or adapter)

    def check(self, full_parameters: bool) -> None:
        """Raises:
        InputError: all parameters are healed; ``base`` is not set, or not a model.
        """
        if full_parameters:
            raise InputError(
                "config.defence.name = safelora: projects the B of an adapter; config.train.full_parameters leaves none"
            )
        unaligned_tensors(self.base, self.facts.title)

    def init(self, params: Params) -> SafeLoraState:
        """Nothing seen yet.

        Raises:
            InputError: all parameters are healed.
        """
        if not isinstance(params, Adapter):
            raise InputError(
                "config.defence.name = safelora: projects the B of an adapter, and there is none"
            )
        return SafeLoraState({}, {})

    def first_pass(
        self, loss: Loss, params: Adapter, sets: Sets, state: SafeLoraState
    ) -> SafeLoraState:
        """``P B`` and c of every module, one module after the other.

        Raises:
            InputError: ``base`` is not set, has not the same matrices, or does not differ from the aligned model; too many modules
                are asked for.
        """
        model = dataclasses.replace(loss.model, weights=loss.weights)
        shift = load_adapter(self.aligned, model, frozen=True) if self.aligned else None
        projected: dict[str, list[Array]] = {target: [] for target in params.targets}
        cosine: dict[str, list[float]] = {target: [] for target in params.targets}
        for module, found in projections(loss, params, self.base, shift, self.facts.title):
            projected[module.target].append(found.projected)
            cosine[module.target].append(float(found.cosine))
        state = SafeLoraState(
            {target: jnp.stack(found) for target, found in projected.items()},
            {target: np.round(found, 5) for target, found in cosine.items()},
        )
        modules = sum(c.size for c in state.cosine.values())
        if self.select == "number" and self.num_layers > modules:
            raise InputError(
                f"config.defence.num_layers = {self.num_layers}: the adapter has {modules} modules"
            )
        return state

    def _threshold_of(self, state: SafeLoraState) -> float:
        """τ."""
        if self.select == "threshold":
            return float(self.threshold)
        return float(np.sort(np.concatenate(list(state.cosine.values())))[self.num_layers - 1])

    def finish(self, params: Adapter, state: SafeLoraState) -> Adapter:
        """``P B`` where c ≤ τ."""
        tau = self._threshold_of(state)
        layers = jax.tree.map(lambda x: x, params.layers)
        for target, cosine in state.cosine.items():
            pair = layers[BLOCK_OF[target]][target]
            chosen = jnp.asarray(cosine <= tau)[:, None, None]
            pair["b"] = jnp.where(chosen, state.projected[target], pair["b"])
        return dataclasses.replace(params, layers=layers)

    def report(self, params: Adapter, state: SafeLoraState) -> dict[str, Any]:
        """Which modules were projected, and ``similarity``, the mean of ``1/(1 + ‖B_new − P B‖)``."""
        tau, new = self._threshold_of(state), self.finish(params, state)
        distance = [
            jnp.linalg.norm(new.layers[BLOCK_OF[t]][t]["b"] - p, axis=(1, 2))
            for t, p in state.projected.items()
        ]
        return {
            "threshold": tau,
            "cosines": {t: c.tolist() for t, c in state.cosine.items()},
            "projected": {t: np.asarray(params.adapted)[c <= tau].tolist() for t, c in state.cosine.items()},
            "similarity": float(jnp.mean(1 / (1 + jnp.stack(distance)))),
        }
