"""RepNoise: alignment that turns the representations of harmful text into noise (arXiv 2405.14577, NeurIPS 2024).

    min_w  L_harmless(w) + β · mean_l MMD(X_l, N(0, 1)) − α · log L_adv(w)
    L_adv = 1 + (CE_final + Σ_{j=0..L} CE_j) / (L + 1)

Stage: alignment. Passes per step: 2 (harmless, harmful) behind one backward pass, and L + 1 more products with the lm head.
Extra memory: MLP outputs and hidden states of the harmful batch; logits and noise of one layer at a time. Extra data: ``harmful``.

X_l is the output of layer l's MLP on the harmful batch. CE_j scores the harmful text by the final norm and the lm head applied to hidden
state j (0 is the embedding); the last of them is behind the final norm already, as transformers hands it out, so it is normed twice. MMD
is that of five Gaussian kernels between the rows of a batch. All of it looks only at *differing* tokens: real ones of the harmful text
that the harmless text of the same row does not have at the same place. In a pair the prompt is shared, so these are about the response.

``paired`` gives both streams one order: record i of ``data.harmful`` must answer the prompt of record i of ``data.alignment``. Without it
the two are unrelated, as in the copies of the method in the repositories of Booster, Panacea, Antidote and T-Vaccine; then nearly every
token behind the template differs, prompts included.

What of the public code is mended: padding is told by the attention mask, not by its id; hooks do not pile up; and with ``masks``
"mended"

* the harmless loss is the ordinary one over response tokens, so that α = β = 0 is SFT (there only its differing tokens count),
* logits at t and labels at t + 1 go by one mask, the label's (there by one each: a differing token behind one that does not differ scores a
  constant ln|V| without gradient),
* token id 0 counts as any other (there it is never a label).

``masks`` "code" takes these three from the code, for a tokenizer that pads with id 0.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from panacea_jax.data.batches import Batch
from panacea_jax.defences.loss import Loss
from panacea_jax.defences.protocol import (
    Batches,
    Defence,
    Facts,
    Gradient,
    Metrics,
    Params,
    RandomKey,
    Stage,
    State,
    StreamSpec,
    check_not_negative,
)
from panacea_jax.models.precision import wide

KERNELS = 5


def differing(harmful: Batch, harmless: Batch) -> Bool[Array, "B T"]:
    """Real tokens of the harmful batch that the harmless one does not have at the same place; the shapes need not agree."""
    rows, length = (min(a, b) for a, b in zip(harmful.tokens.shape, harmless.tokens.shape))
    there = harmless.valid[:rows, :length]
    same = there & (harmful.tokens[:rows, :length] == harmless.tokens[:rows, :length])
    return harmful.valid & ~jnp.zeros_like(harmful.valid).at[:rows, :length].set(same)


class CodeMask(NamedTuple):
    """The public code's masked cross-entropy of one text of a pair.

    Attributes:
        scored: the text, whose loss mask has the tokens that are scored with a gradient.
        share: their share of the tokens that count.
        constant: ln|V| times the share of the others, which the code scores by logits of zero.
    """

    scored: Batch
    share: Float[Array, ""]
    constant: Float[Array, ""]

    @classmethod
    def of(cls, text: Batch, other: Batch, vocab_size: int) -> "CodeMask":
        """From the ids alone, those of padding being 0."""
        length = max(text.tokens.shape[1], other.tokens.shape[1])
        ours, theirs = (
            jnp.pad(jnp.where(b.valid, b.tokens, 0), [(0, 0), (0, length - b.tokens.shape[1])])
            for b in (text, other)
        )
        different = (ours != theirs)[:, : text.tokens.shape[1]]
        label = different & text.valid & (text.tokens != 0)
        kept = label.at[:, 1:].set(label[:, 1:] & different[:, :-1])
        counted, graded = label[:, 1:].sum(), kept[:, 1:].sum()
        share = graded / jnp.maximum(counted, 1)
        constant = jnp.where(counted > 0, (1 - share) * np.log(vocab_size), 0)
        return cls(text._replace(loss_mask=kept), share, constant)

    def mean(self, scored: Float[Array, ""], terms: int = 1) -> Float[Array, ""]:
        """What the mean over ``scored`` becomes over all tokens that count; ``terms``: of how many such means it is the sum."""
        return scored * self.share.astype(scored.dtype) + terms * self.constant.astype(scored.dtype)


def mmd(
    x: Float[Array, "B T D"], y: Float[Array, "B T D"], rows: Bool[Array, "B"]
) -> Float[Array, ""]:
    """Squared maximum mean discrepancy of two sets of rows, the diagonal included.

    The kernel is the sum of ``exp(−‖u − v‖² / b_k)``, ``b_k = b 2^k``, with 4 b the mean squared distance of all pairs, held still.

    Args:
        x, y: the sets, a row being all of [T, D].
        rows: False for rows that only fill up the batch.
    """
    pairs = rows[:, None] & rows[None, :]

    def squared_distances(u: Array, v: Array) -> Float[Array, "B B"]:
        # By the Gram matrix: B² matrix products instead of B² differences of T·D numbers.
        gram = jnp.einsum("itd,jtd->ij", u, v, precision="highest")
        squares = [jnp.sum(jnp.square(z), axis=(1, 2)) for z in (u, v)]
        return squares[0][:, None] + squares[1][None, :] - 2 * gram

    xx, yy, xy = squared_distances(x, x), squared_distances(y, y), squared_distances(x, y)
    n = 2 * jnp.sum(rows, dtype=xx.dtype)
    total = jnp.where(pairs, xx + yy + 2 * xy, 0).sum()
    mean = jax.lax.stop_gradient(total / jnp.maximum(n**2 - n, 1))
    bandwidth = jnp.maximum(mean / 4, float(np.finfo(mean.dtype).tiny))

    def kernel(d: Array) -> Array:
        return jnp.sum(
            jnp.stack([jnp.exp(-d / (bandwidth * 2.0**k)) for k in range(KERNELS)]), axis=0
        )

    values = jnp.where(pairs, kernel(xx) + kernel(yy) - 2 * kernel(xy), 0)
    return values.sum() / jnp.maximum(n / 2, 1) ** 2


def noise_loss(
    mlp_out: Float[Array, "L B T D"], mask: Bool[Array, "B T"], key: Key[Array, ""]
) -> Float[Array, ""]:
    """Mean over layers of the MMD between the masked activations and masked N(0, 1) noise, drawn for one layer at a time."""
    dtype = wide(mlp_out.dtype)
    rows = mask.any(axis=1)

    def layer(total: Array, xs: tuple[Array, Array]) -> tuple[Array, None]:
        x, key = xs
        noise = jax.random.normal(key, x.shape, dtype)
        x, y = (jnp.where(mask[..., None], z.astype(dtype), 0) for z in (x, noise))
        return total + mmd(x, y, rows), None

    keys = jax.random.split(key, len(mlp_out))
    body = jax.checkpoint(layer, prevent_cse=False)
    total, _ = jax.lax.scan(body, jnp.zeros((), dtype), (mlp_out, keys))
    return total / len(mlp_out)


def layerwise_loss(
    loss: Loss, params: Params, states: Float[Array, "layers B T D"], batch: Batch
) -> Float[Array, ""]:
    """``Σ_j CE_j``: each hidden state through the final norm and the lm head, one at a time and recomputed in the backward pass."""

    def layer(total: Array, hidden: Array) -> tuple[Array, None]:
        return total + loss.mean(params, loss.bind(params).norm(hidden), batch), None

    zero = jnp.zeros((), wide(states.dtype))
    total, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), zero, states)
    return total


@dataclasses.dataclass(frozen=True)
class RepNoise(Defence):
    """RepNoise's joint loss.

    Attributes:
        alpha: α, weight of the ascent on harmful text. 1 is the official code's; 0.1 in the copies of Booster, Antidote and T-Vaccine,
            0.02 in Panacea's.
        beta: β, weight of the noise term. 0.001 is the official code's and that of all copies but Panacea's, 0.1.
        paired: harmful and harmless records go together in pairs (official); False: each stream in its own order (the copies).
        masks: which tokens the cross-entropies count: "mended", or "code" as the public code does; see the head of this file.
    """

    alpha: float | int = 1.0
    beta: float | int = 0.001
    paired: bool = True
    masks: Literal["mended", "code"] = "mended"

    stage: ClassVar[Stage] = "align"
    facts: ClassVar[Facts] = Facts(
        title="RepNoise",
        paper="arXiv 2405.14577",
        memory="MLP outputs and hidden states of the harmful batch, logits of one layer at a time",
        code="loss of the official code, paired; its masks mended, or as they are with masks=code",
    )
    reads_every_layer: ClassVar[bool] = True
    unpackable: ClassVar[str] = "compares the rows of its batches, which must be one record each"

    def __post_init__(self) -> None:
        check_not_negative(alpha=self.alpha, beta=self.beta)

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """Harmful records, in pairs with the harmless ones or not."""
        return {"harmful": StreamSpec(passes=1, paired=self.paired)}

    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: State, key: RandomKey
    ) -> Gradient:
        """``∇ (L_harmless + β MMD − α log L_adv)``."""
        harmless, harmful = batches["user"], batches["harmful"]
        mask = differing(harmful, harmless)
        scored, answered, code = harmful._replace(loss_mask=mask), harmless, None
        if self.masks == "code":
            size = loss_fn.model.config.vocab_size
            code = CodeMask.of(harmful, harmless, size), CodeMask.of(harmless, harmful, size)
            scored, answered = code[0].scored, code[1].scored

        def joint(params: Params) -> tuple[Float[Array, ""], Metrics]:
            states, read = loss_fn.hidden_states(params, harmful, ("mlp_out",))
            final = loss_fn.mean(params, states[-1], scored)
            layers = layerwise_loss(loss_fn, params, states, scored)
            noise = noise_loss(read["mlp_out"], mask, key)
            loss = loss_fn(params, answered)
            if code is not None:
                final, layers = code[0].mean(final), code[0].mean(layers, len(states))
                loss = code[1].mean(loss)
            adversary = 1 + (final + layers) / len(states)
            measured = {"loss": loss, "harmful_loss": final, "harmful_loss_layers": adversary,
                        "noise_loss": noise}  # fmt: skip
            return loss + self.beta * noise - self.alpha * jnp.log(adversary), measured

        grads, measured = jax.grad(joint, has_aux=True)(params)
        return grads, state, measured
