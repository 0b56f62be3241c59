"""Triplet, contrastive representation learning (CRL): benign states stay, harmful ones gather elsewhere (arXiv 2506.11938, EMNLP 2025).

    α · mean_{l, benign t} [ ‖h − h⁰‖ − c(h, h̄_l) + m_b ]₊  +  β · mean_{l ∈ depth, harmful t} [ c(h, h̄_l) − c(h, h⁰) + m_h ]₊
    + λ · τ²/B Σ_t KL( p⁰_t ‖ p_t )                  c(u, v) = 1 − cos(u, v),   h̄_l = mean_{harmful t} h

Stage: alignment. Passes per step: 4½, three batches (refusals, benign, harmful) forward and backward, and forward at the start.
Extra memory: the starting parameters w₀, hidden states of six passes, two ``[B, T, V]`` of logits. Extra data: ``harmful``, ``benign``.

h is the hidden state of layer l at token t, as transformers counts them (0 the embedding, the last behind the final norm), h⁰ the same
at w₀. Tokens are those of the answers; benign ones are the main stream's refusals and the ``benign`` records together, in all layers;
harmful ones count in the layers ``depth``. The divergence is taken at every token of the benign records, at temperature τ = 2, and divided
by their number B. h̄ is the batch's, and has a gradient.

Distances, margins and weights are those of the public code's script (github.com/samuelsimko/crl-llm-defense; λ is ε there). The paper's
variant with an attack module, trained to find hard negatives, is not here. The method begins with an aligned model: nothing in it
teaches refusals. For a base that is not aligned ``refusal`` adds the ordinary loss on the main stream; with α = β = λ = 0 that is SFT.

Mended: where h is h⁰ but for roundings, h − h⁰ has their direction, and its norm a gradient as large as elsewhere; here that is 0.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from panacea_jax.defences.dropout import without_dropout
from panacea_jax.defences.kl import divergence
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
    check_not_negative,
)
from panacea_jax.errors import InputError
from panacea_jax.models.precision import wide

TEMPERATURE = 2.0
# Squared norms below are those of a zero, as in PyTorch's normalize.
_SMALLEST = 1e-24

_States = Float[Array, "L B T D"]


def cosine_distance(u: Float[Array, "*N D"], v: Float[Array, "*N D"]) -> Float[Array, "*N"]:
    """``1 − cos(u, v)``."""
    u, v = (x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), _SMALLEST)) for x in (u, v))
    return 1 - jnp.sum(u * v, axis=-1)


def distance(h: Float[Array, "*N D"], start: Float[Array, "*N D"], rounding: float) -> Float[Array, "*N"]:
    """``[‖h − h⁰‖ − rounding · ‖h⁰‖]₊``, with no gradient where it is 0."""
    norm, least = (
        jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1), float(np.finfo(x.dtype).tiny))) for x in (h - start, start)
    )
    return jax.nn.relu(norm - rounding * least)


def rounding_of(dtype: Any) -> float:
    """What equal states may differ by: a rounding of the dtype that they are kept in, or some of the one that sums are made in."""
    kept, summed = (float(jnp.finfo(d).eps) for d in (dtype, wide(dtype)))  # type: ignore[no-untyped-call]
    return max(kept, 32 * summed)


def centres(states: _States, tokens: Bool[Array, "B T"]) -> Float[Array, "L D"]:
    """``h̄``: of each layer the mean over tokens."""
    total = jnp.sum(jnp.where(tokens[..., None], states, 0), axis=(1, 2), dtype=wide(states.dtype))
    return total / jnp.maximum(tokens.sum(), 1)


def hinges(
    states: _States, start: _States, centre: Float[Array, "L D"], tokens: Bool[Array, "B T"], margin: float | int, benign: bool
) -> Float[Array, ""]:
    """The hinge summed over layers and tokens, one layer at a time; ``benign`` says which of the two."""
    dtype, rounding = wide(states.dtype), rounding_of(states.dtype)

    def layer(total: Array, xs: Any) -> tuple[Array, None]:
        h, h0, mean = (x.astype(dtype) for x in xs)
        to_centre = cosine_distance(h, jnp.broadcast_to(mean, h.shape))
        apart = distance(h, h0, rounding) - to_centre if benign else to_centre - cosine_distance(h, h0)
        return total + jnp.sum(jnp.where(tokens, jax.nn.relu(apart + margin), 0)), None

    body = jax.checkpoint(layer, prevent_cse=False)
    return jax.lax.scan(body, jnp.zeros((), dtype), (states, start, centre))[0]


@dataclasses.dataclass(frozen=True)
class Triplet(Anchored):
    """The gradient of the two hinges and the divergence.

    Attributes:
        alpha: α, weight of the benign hinge.
        beta: β, weight of the harmful hinge.
        lam: λ, weight of the divergence.
        margin_benign: m_b.
        margin_harmful: m_h.
        depth: the layers of the harmful hinge, from the first to the last of these shares of the depth: of 32 layers states 20 to 30.
        refusal: weight of the ordinary loss on the main stream; 0, as published, for a model that is aligned.
    """

    alpha: float | int = 0.5
    beta: float | int = 0.6
    lam: float | int = 0.7
    margin_benign: float | int = 2.0
    margin_harmful: float | int = 3.0
    depth: tuple[float, ...] = (0.625, 0.9375)
    refusal: float | int = 0.0

    stage: ClassVar[Stage] = "align"
    facts: ClassVar[Facts] = Facts(
        title="Triplet (CRL)",
        paper="arXiv 2506.11938",
        memory="starting parameters, hidden states of six passes, twice B×T×V logits",
        code="loss of the public code without its attack module; a distance within roundings has no direction",
    )
    reads_every_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_not_negative(
            alpha=self.alpha, beta=self.beta, lam=self.lam, margin_benign=self.margin_benign, margin_harmful=self.margin_harmful,
            refusal=self.refusal,
        )  # fmt: skip
        if len(self.depth) != 2 or not 0 <= self.depth[0] <= self.depth[1] <= 1:
            raise InputError(f"config.defence.depth = {self.depth}: two shares between 0 and 1, the first not above the second")

    @property
    def passes(self) -> float:
        """One more forward pass, at the start."""
        return 3 / 2

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """Harmful and benign records, each with a forward pass at the start."""
        return {name: StreamSpec(passes=3 / 2) for name in ("harmful", "benign")}

    def _layers(self, depth: int) -> slice:
        """Which states of a model of so many layers the harmful hinge looks at."""
        first, last = (round(share * depth) for share in self.depth)
        return slice(first, last + 1)

    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: Anchor, key: RandomKey
    ) -> Gradient:
        """``∇ (α benign hinge + β harmful hinge + λ divergence + refusal · L_align)``."""
        start = {
            name: loss_fn.hidden_states(state.start, without_dropout(batch))[0] for name, batch in batches.items()
        }
        count = len(start["harmful"])
        every, chosen = slice(count), self._layers(count - 1)

        def total(w: Params) -> tuple[Float[Array, ""], Metrics]:
            states = {name: loss_fn.hidden_states(w, batch)[0] for name, batch in batches.items()}
            tokens = {name: batch.loss_mask for name, batch in batches.items()}
            centre = centres(states["harmful"], tokens["harmful"])

            def hinge(name: str, margin: float | int, layers: slice, benign: bool) -> Float[Array, ""]:
                return hinges(states[name][layers], start[name][layers], centre[layers], tokens[name], margin, benign)

            benign = hinge("user", self.margin_benign, every, True) + hinge("benign", self.margin_benign, every, True)
            benign = benign / (count * jnp.maximum(tokens["user"].sum() + tokens["benign"].sum(), 1))
            harmful = hinge("harmful", self.margin_harmful, chosen, False)
            harmful = harmful / ((chosen.stop - chosen.start) * jnp.maximum(tokens["harmful"].sum(), 1))
            found = {"benign_hinge": benign, "harmful_hinge": harmful}
            loss = self.alpha * benign + self.beta * harmful
            if self.lam:
                logits = [
                    loss_fn.bind(at).logits(of["benign"][-1]) / TEMPERATURE
                    for at, of in ((w, states), (state.start, start))
                ]
                apart = divergence(logits[0], logits[1], batches["benign"].valid).sum()
                found["kl"] = TEMPERATURE**2 * apart / jnp.maximum(batches["benign"].records, 1)
                loss = loss + self.lam * found["kl"]
            if self.refusal:
                found["refusal_loss"] = loss_fn.mean(w, states["user"][-1], batches["user"])
                loss = loss + self.refusal * found["refusal_loss"]
            return loss, {"loss": loss, **found}

        grads, metrics = jax.grad(total, has_aux=True)(params)
        return grads, state, metrics
