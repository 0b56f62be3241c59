"""T-Vaccine: Vaccine on the layers that carry safety, in less memory (arXiv 2410.09760).

    min_w  max_{‖e‖≤ρ} L_align(w; o_l + e_l, l ∈ A)      A: S layers drawn by p_l = ‖∇_{o_l} L_harm‖ / Σ_j ‖∇_{o_j} L_harm‖
    e_l = ρ ∇_{o_l} L_align / (N + 1e-7),  N² = Σ_{l ∈ A} ‖∇_{o_l} L_align‖²

Stage: alignment. Passes per step: 2 on the same batch, and one on a harmful batch at every K-th step. Extra memory: S tensors
``[B, T, D]``. Extra data: ``harmful`` (a new batch every K steps; the public code takes single records, ``train.harmful_batch_size`` 1).

o_l is the output of layer l's attention module, before the residual. A is drawn anew, without replacement, at every J-th step. Outside A
the attention matrices stand still: no update, no weight decay, moments and bias corrections as they were.

A is traced, so one compiled step serves every draw. Therefore no layer can be compiled as the one whose activations are kept, and all of
them are rematerialised, those in A too, whatever ``config.model.remat`` says: one layer input a layer is kept. That is the least memory;
the public code keeps all activations of the layers in A instead, and recomputes only the others.

Differs from the public code in one thing: there, layers below the lowest of A get no gradient at all, a side effect of how it
checkpoints; here their MLP matrices train as those of all other layers do.
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Batches,
    Defence,
    Facts,
    Gradient,
    Params,
    RandomKey,
    Stage,
    StreamSpec,
    check_counts,
    check_not_negative,
)
from panacea_jax.defences.vaccine import no_offsets, perturbed_gradient
from panacea_jax.errors import InputError
from panacea_jax.models.adapter import Adapter
from panacea_jax.models.precision import wide


class TVaccineState(NamedTuple):
    """What T-Vaccine carries from step to step.

    Attributes:
        probabilities: p, by layer.
        active: A, rising.
        steps: number of steps taken.
    """

    probabilities: Float[Array, "L"]
    active: Int[Array, "S"]
    steps: Int[Array, ""]


def importance(loss: Loss, params: Params, batch: Any) -> Float[Array, "L"]:
    """p: the share of each layer in the sum of ``‖∂L/∂o_l‖``; all alike where that is 0."""
    at_outputs = jax.grad(loss, argnums=2)(params, batch, no_offsets(loss, batch))
    squares = at_outputs.astype(wide(at_outputs.dtype)) ** 2
    norms = jnp.sqrt(jnp.sum(squares, axis=(1, 2, 3)))
    total = norms.sum()
    return jnp.where(total > 0, norms / jnp.where(total > 0, total, 1), 1 / norms.size)


def with_empty_row(batch: Any) -> Any:
    """The batch, and below it a row without tokens, which changes no loss."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 1), *((0, 0),) * (x.ndim - 1))), batch)


def draw_layers(key: Key[Array, ""], probabilities: Float[Array, "L"], count: int) -> Int[Array, "S"]:
    """So many distinct layers, drawn one after the other by their probabilities; rising."""
    chosen = jax.random.choice(key, probabilities.size, (count,), replace=False, p=probabilities)
    return jnp.sort(chosen).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class TVaccine(Defence):
    """Vaccine's second gradient, with perturbation and training of attention on S layers.

    Attributes:
        rho: ρ, L2 norm of the perturbation over the attention outputs of the S layers together.
        layers: S, number of active layers.
        interval: J, steps between two draws of the active layers. The paper is said to draw at every step, its code at every 20th.
        importance_interval: K, steps between two looks at a harmful batch.
        importance_average: "none": each look replaces the last, as in the code; "mean": p is the mean over all looks.
        freeze: what stands still outside the active layers: "attention", as in the code, or the whole "layer", as the paper has it.
    """

    rho: float | int = 3.0
    layers: int = 8
    interval: int = 20
    importance_interval: int = 200
    importance_average: Literal["none", "mean"] = "none"
    freeze: Literal["attention", "layer"] = "attention"

    stage: ClassVar[Stage] = "align"
    facts: ClassVar[Facts] = Facts(
        title="T-Vaccine",
        paper="arXiv 2410.09760",
        memory="S tensors B×T×D; every layer rematerialised",
        code="draws, freezing and single-record importance as its code; MLPs below the lowest active layer train too",
    )

    def __post_init__(self) -> None:
        check_not_negative(rho=self.rho)
        check_counts(
            layers=self.layers,
            interval=self.interval,
            importance_interval=self.importance_interval,
        )
        choices = {"importance_average": ("none", "mean"), "freeze": ("attention", "layer")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(
                    f"config.defence.{name} = {getattr(self, name)!r}: one of {', '.join(known)}"
                )

    @property
    def passes(self) -> int:
        """Two on the same batch."""
        return 2

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """The harmful stream moves on when it is looked at."""
        interval = self.importance_interval
        return {"harmful": StreamSpec(passes=1 / interval, interval=interval)}

    def init(self, params: Params) -> TVaccineState:
        """Any state: step 0 looks and draws.

        Raises:
            InputError: more active layers than the model has, or an adapter of some layers: which are active is drawn from all.
        """
        if getattr(params, "numbers", None) is not None:
            raise InputError("config.lora.layers: t_vaccine draws its layers from all of them, so an adapter has to have all")
        count = _num_layers(params)
        if self.layers > count:
            raise InputError(f"config.defence.layers = {self.layers}: the model has {count}")
        dtype = wide(jax.tree.leaves(params)[0].dtype)
        active = jnp.arange(self.layers, dtype=jnp.int32)
        return TVaccineState(jnp.full(count, 1 / count, dtype), active, jnp.zeros((), jnp.int32))

    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: TVaccineState, key: RandomKey
    ) -> Gradient:
        """Look and draw when it is time, then the gradient at the perturbed activations of the active layers."""
        loss = dataclasses.replace(loss_fn, remat="full")
        p = jax.lax.cond(
            state.steps % self.importance_interval == 0,
            lambda: self._look(loss, params, batches["harmful"], state),
            lambda: state.probabilities,
        )
        fresh = state.steps % self.interval == 0
        active = jnp.where(fresh, draw_layers(key, p, self.layers), state.active)
        grads, metrics = perturbed_gradient(loss, params, batches["user"], self.rho, active)
        return grads, TVaccineState(p, active, state.steps + 1), metrics

    def _look(
        self, loss: Loss, params: Params, batch: Any, state: TVaccineState
    ) -> Float[Array, "L"]:
        if len(batch.tokens) == 1 and loss.model.mesh.devices.flat[0].platform == "tpu":
            # For one row alone the TPU's compiler keeps transposed copies of attention matrices, of all layers (2 GiB at 7B).
            batch = with_empty_row(batch)
        p = importance(loss, params, batch).astype(state.probabilities.dtype)
        if self.importance_average == "none":
            return p
        looks = state.steps // self.importance_interval + 1
        return state.probabilities + (p - state.probabilities) / looks

    def trained(self, params: Params, state: TVaccineState) -> Params:
        """False for the attention matrices (or whole layers) outside the active set."""
        active = jnp.zeros(_num_layers(params), bool).at[state.active].set(True)
        frozen = "layers" if self.freeze == "layer" else "self_attn"

        def mask(path: Any, leaf: Array) -> Bool[Array, "..."]:
            names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
            return active if frozen in names else jnp.ones((), bool)

        return jax.tree_util.tree_map_with_path(mask, params)


def _num_layers(params: Params) -> int:
    """Layers are stacked on the first axis, in an adapter as in all weights."""
    layers = params.layers if isinstance(params, Adapter) else params["layers"]
    return int(jax.tree.leaves(layers)[0].shape[0])
