"""TAR: alignment against simulated fine-tuning attacks (arXiv 2408.00761, ICLR 2025).

    grad = μ ∇ L_retain(θ₀) + Σ_{i ∈ I} w_i ∇ L_TR(θ_i)            θ_i = θ after i + 1 AdamW steps on harmful batches, from θ₀
    L_TR = − mean token entropy on a held-out harmful batch          w_i = τ exp((i − K + 1) / 16),  I = {n − 1, 2n − 1, …, K − 1}
    L_retain = L_align + mean over hidden states of the mean distance ‖H(θ₀) − H(θ_start)‖ of a token

Stage: alignment. Passes per step: K on harmful batches, K/n on the held-out one, 1 on the alignment batch and 1 forward pass of the
starting model. Extra memory: the starting weights; in a step θ_i, two moments and the sum of gradients, all of the size of the trainable
tree; activations of one pass at a time. Extra data: ``harmful``, K + 1 batches a step.

Differs from SFT in all of it; SFT's gradient is left with τ = 0 as long as w is where it started. First order: gradients at θ_i are applied
at θ₀. The reference of the distance is the same base with the starting adapter, so LoRA needs no second model.

Of the official code: one adversary a step, always on harmful text (there also instructions on it, and a switch from retain to harmful
text); no lower bound on L_TR, as its scripts have it; entropy and distance over real tokens, where the code takes padding too; AdamW's
usual tail outside instead of its schedule-free one; its first stage, Random Mapping, is not here. The 1/16 is its rate for any K. The
baseline called TAR in T-Vaccine's repository is another thing: it assigns its meta-gradient to a temporary tensor, so that it is SFT on the
alignment data at three times the cost. That is not reproduced.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from panacea_jax.data.batches import Batch, deinterleave
from panacea_jax.defences.dropout import again, without_dropout
from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Anchor,
    Anchored,
    Batches,
    Facts,
    Gradient,
    Metrics,
    Params,
    RandomKey,
    Stage,
    StreamSpec,
    check_counts,
    check_not_negative,
)
from panacea_jax.errors import InputError
from panacea_jax.models.precision import wide

RATE = 1 / 16
ADVERSARY_WEIGHT_DECAY = 0.01  # PyTorch's default, which the official code leaves alone


def negative_entropy(loss: Loss, params: Params, batch: Batch) -> Float[Array, ""]:
    """``L_TR``: minus the entropy of the next-token distribution, mean over real tokens."""
    logits = loss.bind(params).logits(loss.forward(params, batch).hidden)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    negative = jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jnp.where(batch.valid, negative, 0).sum() / jnp.maximum(batch.valid.sum(), 1)


def mean_distance(
    a: Float[Array, "layers B T D"], b: Float[Array, "layers B T D"], batch: Batch
) -> Float[Array, ""]:
    """L2 distance of two sets of hidden states, mean over real tokens and over the set; its gradient where they meet is 0."""
    dtype = wide(a.dtype)
    squares = jnp.sum(jnp.square(a.astype(dtype) - b.astype(dtype)), axis=-1)
    apart = (squares > 0) & batch.valid
    distances = jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1)), 0)
    return distances.sum() / (len(a) * jnp.maximum(batch.valid.sum(), 1))


@dataclasses.dataclass(frozen=True)
class Tar(Anchored):
    """TAR's first-order gradient.

    Attributes:
        inner_steps: K, steps of the adversary.
        inner_every: n, the tamper-resistance gradient is taken after each n-th of them; must divide K.
        inner_learning_rate: the adversary's; of a tuple one is drawn each step, as the official scripts draw from (2e-6, 2e-5, 4e-5).
        tamper_weight: τ, weight of the gradient after the last step.
        retain_weight: μ, weight of the retain loss.
    """

    inner_steps: int = 64
    inner_every: int = 4
    inner_learning_rate: float | int | tuple[float, ...] = 2e-5
    tamper_weight: float | int = 4.0
    retain_weight: float | int = 1.0

    stage: ClassVar[Stage] = "align"
    facts: ClassVar[Facts] = Facts(
        title="TAR",
        paper="arXiv 2408.00761",
        memory="the starting weights; in a step four trees of the size of the trainable one",
        code="second stage of the official code, one kind of adversary; not the inert copy in T-Vaccine's",
    )
    reads_every_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(inner_steps=self.inner_steps, inner_every=self.inner_every)
        if self.inner_steps % self.inner_every:
            raise InputError(
                f"config.defence.inner_every = {self.inner_every}: must divide inner_steps = {self.inner_steps}"
            )
        check_not_negative(tamper_weight=self.tamper_weight, retain_weight=self.retain_weight)
        if not self._rates or not all(0 <= rate < float("inf") for rate in self._rates):
            raise InputError(
                f"config.defence.inner_learning_rate = {self.inner_learning_rate}: a finite number, 0 or more"
            )

    @property
    def _rates(self) -> tuple[float | int, ...]:
        rate = self.inner_learning_rate
        return rate if isinstance(rate, tuple) else (rate,)

    @property
    def passes(self) -> float:
        """The alignment batch, and a forward pass of the starting model."""
        return 3 / 2

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """Harmful batches: one for each step of the adversary, and the held-out one."""
        passes = self.inner_steps + self.inner_steps // self.inner_every
        return {"harmful": StreamSpec(passes=passes, repeats=self.inner_steps + 1)}

    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: Anchor, key: RandomKey
    ) -> Gradient:
        """The retain gradient at θ₀ and the tamper-resistance gradients along the attack."""
        tamper, attack = self._tamper_gradient(loss_fn, params, batches["harmful"], key)
        retain, kept = self._retain_gradient(loss_fn, params, batches["user"], state.start)
        grads = jax.tree.map(lambda r, t: self.retain_weight * r + t, retain, tamper)
        return grads, state, {**kept, **attack}

    def _retain_gradient(
        self, loss: Loss, params: Params, batch: Batch, start: Params
    ) -> tuple[Params, Metrics]:
        """``∇ L_retain``, and what to log."""
        reference, _ = loss.hidden_states(start, without_dropout(batch))
        # At the start itself the distance is 0 and so is its gradient; rounding alone would make unit vectors of it.
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(start))
        moved = jnp.stack([jnp.any(a != b) for a, b in pairs]).any()

        def retain(params: Params) -> tuple[Float[Array, ""], Metrics]:
            states, _ = loss.hidden_states(params, batch)
            lm = loss.mean(params, states[-1], batch)
            distance = jnp.where(moved, mean_distance(states, reference, batch), 0)
            return lm + distance, {"loss": lm, "distance": distance}

        return jax.grad(retain, has_aux=True)(params)

    def _tamper_gradient(
        self, loss: Loss, params: Params, harmful: Batch, key: Key[Array, ""]
    ) -> tuple[Params, Metrics]:
        """``Σ w_i ∇ L_TR(θ_i)``, and what to log. Nothing differentiates through the attack, so it keeps no activations."""
        whole = deinterleave(harmful, self.inner_steps + 1)
        attack = jax.tree.map(lambda x: x[:-1].reshape(-1, self.inner_every, *x.shape[1:]), whole)
        held_out = jax.tree.map(lambda x: x[-1], whole)
        rates = self._rates
        rate = rates[0] if len(rates) == 1 else jax.random.choice(key, jnp.asarray(rates))
        adversary = optax.adamw(rate, weight_decay=ADVERSARY_WEIGHT_DECAY)
        after = jnp.arange(self.inner_every, self.inner_steps + 1, self.inner_every)
        weights = self.tamper_weight * jnp.exp(RATE * (after - self.inner_steps))

        def step(carry: tuple[Params, Any], batch: Batch) -> tuple[tuple[Params, Any], Array]:
            theta, moments = carry
            value, g = jax.value_and_grad(loss)(theta, batch)
            updates, moments = adversary.update(g, moments, theta)
            return (optax.apply_updates(theta, updates), moments), value

        def stretch(carry: Any, xs: tuple[Batch, Array, Array]) -> tuple[Any, tuple[Array, Array]]:
            attacked, total = carry
            batches, weight, steps = xs
            attacked, losses = jax.lax.scan(step, attacked, batches)
            look = jax.value_and_grad(negative_entropy, argnums=1)
            value, g = look(loss, attacked[0], again(held_out, steps))
            total = jax.tree.map(lambda t, x: t + weight.astype(x.dtype) * x, total, g)
            return (attacked, total), (losses, value)

        start = ((params, adversary.init(params)), jax.tree.map(jnp.zeros_like, params))
        (_, total), (losses, values) = jax.lax.scan(stretch, start, (attack, weights, after))
        first, last = losses.ravel()[0], losses.ravel()[-1]
        return total, {
            "harmful_loss": first,
            "harmful_loss_attacked": last,
            "tamper_loss": values[-1],
            "norm_tamper": optax.tree.norm(total),
        }
