"""RESTA: a safety vector added to the finished weights (task arithmetic, arXiv 2402.11746, ACL 2024).

    w ← w + γ (W_aligned − W_unaligned)

Stage: post-fine-tuning, one shot. Passes: none. Extra memory: the new weights, one matrix of each of the two models at a time; for an
adapter the safety vector's own ranks. Extra data: none, but the weights of an unaligned model (``base``).

On an adapter the aligned and the unaligned model are each the base or an adapter of it, so the sum is an adapter again, exactly: of the
ranks of all together. The paper makes its unaligned model by fine-tuning the aligned one on harmful records; such an adapter may be named
in ``base``, and so may the model before alignment. Where that differs from the adapter's base in the matrices themselves, no adapter can
hold the vector, and the model has to be healed as a whole, after ``panacea convert``. Of all weights every tensor counts.

Open: the paper's γ is not known to us, 1 is the plain sum; its variant that first drops and rescales entries at random (DARE) is left out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array

from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Facts,
    Method,
    Params,
    Sets,
    Stage,
    State,
    check_not_negative,
)
from panacea_jax.defences.safety_vector import anew, unaligned_tensors
from panacea_jax.errors import InputError
from panacea_jax.models.adapter import Adapter, sum_of_products
from panacea_jax.models.head import by_embedding
from panacea_jax.models.hub import local_folder
from panacea_jax.models.peft import load_adapter
from panacea_jax.models.peft_config import CONFIG_FILE
from panacea_jax.models.quantise import whole
from panacea_jax.models.tensorfile import Tensor
from panacea_jax.models.weights import find_tensors, load_layer
from panacea_jax.stores import stand_in


class RestaState(NamedTuple):
    """The sum; None before the look at both models."""

    healed: Params | None = None


@dataclasses.dataclass(frozen=True)
class Resta(Method):
    """Add what alignment changed.

    Attributes:
        base: the unaligned model: Hugging Face folder or hub id; or a PEFT folder that makes it of the adapter's base.
        aligned: the aligned model: of an adapter, the PEFT folder that makes it of the base, "" where that is aligned; of all weights,
            its Hugging Face folder. In a work directory it is found: what fine-tuning went on from.
        gamma: γ.
    """

    base: str = ""
    aligned: str = ""
    gamma: float | int = 1.0

    stage: ClassVar[Stage] = "heal"
    facts: ClassVar[Facts] = Facts(
        title="RESTA",
        paper="arXiv 2402.11746",
        memory="the new weights; for an adapter the ranks of the safety vector",
        code="the plain sum, without DARE; public code not read",
    )

    def __post_init__(self) -> None:
        check_not_negative(gamma=self.gamma)

    @property
    def folders(self) -> tuple[str, str]:
        """The models that it reads; "" where none is named."""
        return self.base, self.aligned

    def aligned_by(self, adapter: str) -> "Resta":
        """Adds what made the aligned model; what is said of it stays."""
        return dataclasses.replace(self, aligned=self.aligned or adapter)

    @property
    def _base_is_adapter(self) -> bool:
        return bool(self.base) and (stand_in(self.base) / CONFIG_FILE).is_file()

    def check(self, full_parameters: bool) -> None:
        """Raises:
        InputError: ``base`` is not set, or neither a model nor, where an adapter is healed, a PEFT folder.
        """
        if full_parameters and self._base_is_adapter:
            raise InputError(f"config.defence.base = {self.base}: an adapter; all weights need a whole model, see `panacea convert`")
        if not self._base_is_adapter:
            unaligned_tensors(self.base, self.facts.title)

    def init(self, params: Params) -> RestaState:
        """Nothing seen yet."""
        return RestaState()

    def first_pass(self, loss: Loss, params: Params, sets: Sets, state: State) -> RestaState:
        """The sum.

        Raises:
            InputError: a model is not set, or not of the same matrices; there is no safety vector, or one that an adapter cannot hold.
        """
        self.check(not isinstance(params, Adapter))
        return RestaState(self._of_adapter(loss, params) if isinstance(params, Adapter) else self._of_weights(params))

    def _of_adapter(self, loss: Loss, params: Adapter) -> Adapter:
        model = dataclasses.replace(loss.model, weights=loss.weights)
        parts, weights = [params], [1.0]
        if self.aligned:
            parts.append(load_adapter(self.aligned, model, frozen=True))
            weights.append(float(self.gamma))
        if self._base_is_adapter:
            parts.append(load_adapter(self.base, model, frozen=True))
            weights.append(-float(self.gamma))
        else:
            self._check_base(loss)
        if len(parts) == 1:
            raise InputError(f"config.defence.base = {self.base}: is the aligned model; give the one before")
        return sum_of_products(parts, weights)

    def _check_base(self, loss: Loss) -> None:
        """Raises:
        InputError: ``base`` is not the base of the adapter.
        """
        if loss.model.folder is not None and local_folder(self.base).resolve() == loss.model.folder.resolve():
            return
        weights = flatten_dict(loss.weights, sep="/")
        tensors = _for(unaligned_tensors(self.base, self.facts.title), weights)
        for path, held in weights.items():
            w = whole(held, self.facts.title)
            for layer in range(len(w)) if path.startswith("layers/") else (None,):
                if not bool(jnp.array_equal(load_layer(tensors, path, layer, w), w if layer is None else w[layer])):
                    raise InputError(
                        f"config.defence.base = {self.base}: {path} is not that of the adapter's base, so no adapter can hold the "
                        "difference; merge it with `panacea convert` and heal the model, with train.full_parameters"
                    )

    def _of_weights(self, params: Mapping[str, Any]) -> dict[str, Any]:
        if not self.aligned:
            raise InputError("config.defence.aligned is not set: RESTA of all weights needs the folder of the aligned model")
        weights = flatten_dict(params, sep="/")
        before = _for(unaligned_tensors(self.base, self.facts.title), weights)
        try:
            after = _for(find_tensors(local_folder(self.aligned)), weights)
        except InputError as error:
            raise InputError(f"config.defence.aligned = {self.aligned}: {error}") from error
        differ = False

        def change(path: str, layer: int | None, w: Array, like: Array) -> Array:
            nonlocal differ
            vector = load_layer(after, path, layer, like) - load_layer(before, path, layer, like)
            differ = differ or bool(vector.any())
            return w + self.gamma * vector

        healed = anew(params, change)
        if not differ:
            raise InputError(f"config.defence.base = {self.base}: is the aligned model; give the one before")
        return healed

    def finish(self, params: Params, state: RestaState) -> Params:
        """``w + γ (W_aligned − W_unaligned)``."""
        return state.healed


def _for(tensors: Mapping[str, Tensor], weights: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Tensors as a model with these weights looks for them."""
    return by_embedding(tensors, dict.fromkeys(weights, ()))
