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
from panacea_jax.errors import InputError
from panacea_jax.models.adapter import BLOCK_OF, Adapter
from panacea_jax.models.hub import local_folder
from panacea_jax.models.peft import load_adapter
from panacea_jax.models.quantise import whole
from panacea_jax.models.tensorfile import Tensor
from panacea_jax.models.weights import find_tensors, load_layer


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
        self._base_tensors()

    def _base_tensors(self) -> dict[str, Tensor]:
        """Where the matrices of the unaligned model lie.

        Raises:
            InputError: ``base`` is not set, or not a model.
        """
        if not self.base:
            raise InputError(
                "config.defence.base is not set: Safe LoRA needs the model before its alignment"
            )
        try:
            return find_tensors(local_folder(self.base))
        except InputError as error:
            raise InputError(f"config.defence.base = {self.base}: {error}") from error

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
        tensors = self._base_tensors()
        state = SafeLoraState({}, {})
        for target in params.targets:
            block = BLOCK_OF[target]
            kernel = whole(loss.weights["layers"][block][target]["kernel"], "Safe LoRA")
            pair = params.layers[block][target]
            projected, cosine = [], []
            for place, layer in enumerate(params.adapted):
                path = f"layers/{block}/{target}/kernel"
                found = _project(
                    kernel[layer],
                    _product_of(shift, target, layer),
                    load_layer(tensors, path, layer, kernel),
                    _of(pair, place),
                )
                if not float(found.size):
                    raise InputError(
                        f"config.defence.base = {self.base}: {target} of layer {layer} is the aligned model's; give the one before"
                    )
                projected.append(found.projected)
                cosine.append(float(found.cosine))
            state.projected[target] = jnp.stack(projected)
            state.cosine[target] = np.round(cosine, 5)
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


class _Projection(NamedTuple):
    projected: Float[Array, "r out"]
    cosine: Float[Array, ""]
    size: Float[Array, ""]


def _product_of(adapter: Adapter | None, target: str, layer: int) -> tuple[float, tuple[Array, Array]] | None:
    """What an adapter adds to a projection of a layer; None: nothing."""
    if adapter is None or target not in adapter.targets or (place := adapter.place(layer)) is None:
        return None
    return adapter.scale, _of(adapter.layers[BLOCK_OF[target]][target], place)


def _of(pair: dict[str, Array], layer: int) -> tuple[Array, Array]:
    return pair["a"][layer], pair["b"][layer]


@jax.jit
def _project(
    kernel: Float[Array, "in out"],
    merged: tuple[Any, tuple[Array, Array]] | None,
    base: Float[Array, "in out"],
    pair: tuple[Float[Array, "in r"], Float[Array, "r out"]],
) -> _Projection:
    """Everything transposed: our matrices are ``[in, out]``, so ``B A`` is ``a b``, and ``P B`` is ``b Δᵀ Δ`` with our Δ."""
    a, b = pair
    with jax.default_matmul_precision("highest"):
        delta = kernel.astype(b.dtype) - base.astype(b.dtype)
        if merged is not None:
            scale, (merged_a, merged_b) = merged
            delta = delta + scale * (merged_a @ merged_b)
        size = jnp.linalg.norm(delta)
        projected = (b @ delta.T) @ delta / jnp.where(size > 0, size, 1)
        gram = a.T @ a  # ⟨a x, a y⟩ = Σ (gram x) ∘ y
        dot = jnp.sum((gram @ projected) * b)
        norms = jnp.sqrt(jnp.sum((gram @ projected) * projected) * jnp.sum((gram @ b) * b))
    return _Projection(projected, dot / jnp.maximum(norms, 1e-8), size)
