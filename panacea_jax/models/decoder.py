"""The one decoder: Llama, Mistral, Qwen2 and 3, Gemma, Gemma 2 and 3 are settings of it.

A pre-norm transformer with rotary positions, grouped-query attention and a gated MLP. Its
parameters carry Hugging Face's module names, with all layers stacked on axis 0 of each array. What
goes through them from tokens to hidden states is in bound.py. Numbers are computed in ``dtype``;
norms, rotary angles, softmax and logits in at least float32.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from panacea_jax.errors import InputError
from panacea_jax.models.config import ModelConfig
from panacea_jax.models.fused import BACKENDS
from panacea_jax.models.layers import DecoderLayer, Linear, RMSNorm
from panacea_jax.models.precision import wide

REMAT = ("none", "dots", "full")


class Embedding(nnx.Module):
    """Token embedding table ``[V, D]``."""

    def __init__(self, config: ModelConfig) -> None:
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """The output head with its numbers, apart from the rest of the decoder.

    Attributes:
        matrix: ``[D, V]``, or the embedding's ``[V, D]``.
        tied: it is the embedding's.
        softcap: c; logits become c·tanh(logits/c) (Gemma 2, arXiv 2408.00118, §2).
    """

    matrix: Any
    tied: bool = dataclasses.field(metadata={"static": True})
    softcap: float | None = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Logits of final hidden states, in at least float32."""
        with jax.named_scope("lm_head"):
            matrix = self.matrix.astype(x.dtype)
            out = (_logits if wide(x.dtype) == x.dtype else _narrow_logits)(x, matrix, self.tied)
            cap = self.softcap
            return out if cap is None else jnp.tanh(out / cap) * cap


def _logits(x: Float[Array, "*N D"], matrix: Any, tied: bool) -> Float[Array, "*N V"]:
    return jnp.einsum("...d,vd->...v" if tied else "...d,dv->...v", x, matrix, preferred_element_type=wide(x.dtype))


# The gradient of wide logits times a narrow matrix would make a wide copy of the matrix, the largest there is; narrow, as activations' are,
# it takes the matrix as it lies.
_narrow_logits = jax.custom_vjp(_logits, nondiff_argnums=(2,))


def _with_factors(x: Any, matrix: Any, tied: bool) -> tuple[Any, Any]:
    return _logits(x, matrix, tied), (x, matrix)


def _by_factors(tied: bool, factors: tuple[Any, Any], by: Float[Array, "*N V"]) -> tuple[Any, Any]:
    x, matrix = factors
    by = by.astype(x.dtype)
    by_x = jnp.einsum("...v,vd->...d" if tied else "...v,dv->...d", by, matrix, preferred_element_type=wide(x.dtype))
    by_matrix = jnp.einsum("...v,...d->vd" if tied else "...v,...d->dv", by, x, preferred_element_type=wide(x.dtype))
    return by_x.astype(x.dtype), by_matrix.astype(matrix.dtype)


_narrow_logits.defvjp(_with_factors, _by_factors)


class Decoder(nnx.Module):
    """The whole model, from token ids to logits.

    Args:
        config: shapes and variants.
        dtype: compute dtype; weights of any float dtype are cast to it where they are used.
        remat: what the backward pass recomputes: ``"none"``, ``"dots"`` (all but matmul outputs) or
            ``"full"`` (whole layers).
        attention: back-end, see :func:`panacea_jax.models.fused.choose`.

    Raises:
        InputError: unknown ``remat`` or ``attention``.
    """

    def __init__(
        self, config: ModelConfig, dtype: Any, remat: str = "none", attention: str = "auto"
    ) -> None:
        if remat not in REMAT:
            raise InputError(f"config.model.remat = {remat}: one of {', '.join(REMAT)}")
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        if attention not in BACKENDS:
            raise InputError(f"config.model.attention = {attention}: one of {', '.join(BACKENDS)}")
        self.attention = attention
        self.embed_tokens = Embedding(config)
        self.layers = DecoderLayer((config.num_layers,), config)
        self.norm = RMSNorm((), config, config.hidden_size)
        self.lm_head = (
            None
            if config.tie_embeddings or config.num_labels
            else Linear((), config.hidden_size, config.vocab_size, bias=False)
        )
        self.score = (
            Linear((), config.hidden_size, config.num_labels, bias=False)
            if config.num_labels
            else None
        )

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What enters the first layer."""
        x = self.embed_tokens.embedding[...][tokens].astype(self.dtype)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(self.config.hidden_size), self.dtype)
        return x

    @property
    def head(self) -> Head:
        """What makes logits: over the vocabulary, or over the labels of a classifier."""
        own = self.lm_head if self.score is None else self.score
        cap = self.config.final_softcap if self.score is None else None
        if own is None:
            return Head(self.embed_tokens.embedding[...], True, cap)
        return Head(own.kernel[...], False, cap)
