"""What a decoder looks like, and what follows from it: sizes, operation counts, rotary angles."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jaxtyping import Float

from panacea_jax.errors import InputError
from panacea_jax.untrusted import read_object


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    Attributes:
        kind: ``"linear"`` (all divided by ``factor``) or ``"llama3"`` (only the slow ones, with a
            smooth transition).
        factor: the stretch.
        low_freq_factor: llama3 only; wavelengths above ``original_length / low_freq_factor`` are
            divided by ``factor``.
        high_freq_factor: llama3 only; wavelengths below ``original_length / high_freq_factor`` are
            left alone.
        original_length: llama3 only; context length of pre-training, in tokens.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Static description of a decoder; hashable, so that it can be part of a jit key.

    Attributes:
        model_type: Hugging Face's family name, e.g. ``"llama"``.
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F, width of the gated MLP.
        num_layers: L.
        num_heads: query heads H.
        num_kv_heads: key/value heads KV, a divisor of H.
        head_dim: hd; not always D/H (Gemma).
        rope_theta: base of the rotary frequencies.
        rope_scaling: stretch of the rotary frequencies, or None.
        rms_norm_eps: added to the mean square.
        activation: ``"silu"``, ``"gelu_tanh"`` or ``"gelu"``.
        tie_embeddings: the output head is the transposed embedding.
        qkv_bias: q, k and v projections have a bias.
        o_bias: the output projection has a bias.
        mlp_bias: gate, up and down projections have a bias.
        windows: sliding window of each layer in tokens, 0 for full attention; None if all are full.
        qk_norm: queries and keys are normed, each head by itself, before they are rotated (Qwen3, Gemma 3).
        local_rope_theta: base of the rotary frequencies, never stretched, of the layers with a window,
            where only some have one (Gemma 3); None: as of the others.
        scale_embeddings: embeddings are multiplied by √D (Gemma).
        unit_offset_norm: norms multiply by (1 + scale) (Gemma).
        post_norms: norms also follow attention and MLP (Gemma 2 and 3).
        attention_softcap: c in c·tanh(scores/c), or None.
        final_softcap: the same for the logits.
        query_scale: multiplier of q·k.
        num_labels: outputs of a sequence classifier's head, which takes the place of the output
            head; 0 for a language model.
        nested: Hugging Face's model of this folder has a vision tower beside the decoder.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_scale: float
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    activation: str = "silu"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    windows: tuple[int, ...] | None = None
    qk_norm: bool = False
    local_rope_theta: float | None = None
    scale_embeddings: bool = False
    unit_offset_norm: bool = False
    post_norms: bool = False
    attention_softcap: float | None = None
    final_softcap: float | None = None
    num_labels: int = 0
    nested: bool = False

    def matmul_parameters(self) -> int:
        """Weights that take part in a matrix product for every token (kernels and the output head,
        not the embedding).
        """
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        head = self.hidden_size * (self.num_labels or self.vocab_size)
        return self.num_layers * (attention + mlp) + head

    def num_parameters(self) -> int:
        """All weights; a tied head is counted once."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        per_layer = (4 if self.post_norms else 2) * self.hidden_size
        per_layer += self.qk_norm * 2 * self.head_dim
        per_layer += self.qkv_bias * (heads + 2 * kv_heads) + self.o_bias * self.hidden_size
        per_layer += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        tied = self.tie_embeddings and not self.num_labels
        embedding = 0 if tied else self.vocab_size * self.hidden_size
        return self.matmul_parameters() + embedding + self.num_layers * per_layer + self.hidden_size

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one forward pass, per token of a sequence of ``length``
        tokens.

        A multiply and an add per matmul weight, and q·k and p·v over the keys that causality and
        the window leave visible, on average (Kaplan et al., arXiv 2001.08361, §2.1, counts the same
        way without causality). A backward pass through all weights costs twice as much; through
        activations only (LoRA) about as much.
        """
        windows = self.windows or (0,) * self.num_layers
        keys = sum(_mean_visible(length, window) for window in windows)
        return 2.0 * self.matmul_parameters() + 4.0 * keys * self.num_heads * self.head_dim

    def rope_frequencies(self, local: bool = False) -> Float[np.ndarray, "half"]:
        """Angle per position of each rotated pair, ``[head_dim / 2]``, float64.

        RoFormer (Su et al., arXiv 2104.09864, §3.2.2), stretched as ``rope_scaling`` says.

        Args:
            local: those of ``local_rope_theta``.
        """
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        if local and self.local_rope_theta is not None:
            return self.local_rope_theta**-exponents
        frequencies = self.rope_theta**-exponents
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        if scaling.kind == "linear":
            return frequencies / scaling.factor
        # Turns made over the original context: below low_freq_factor fully stretched, above
        # high_freq_factor not at all.
        turns = scaling.original_length * frequencies / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _mean_visible(length: int, window: int) -> float:
    """Keys seen by a query, averaged over a sequence."""
    w = min(window, length) if window else length
    return (w * (w + 1) / 2 + (length - w) * w) / length


# Vision-language models whose language model is one of ours, and the class of that alone.
NESTED = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
# What such a model's config.json says once, for all its parts.
_SHARED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings", "quantization_config",
)  # fmt: skip


def read_config(folder: str | PurePath) -> dict[str, Any]:
    """``config.json`` of a Hugging Face folder's language model.

    Raises:
        InputError: as of :func:`read_whole_config`.
    """
    return dict(language_part(read_whole_config(folder)))


def language_part(d: Mapping[str, Any]) -> Mapping[str, Any]:
    """A parsed ``config.json`` as the language model alone has it; itself where there is no vision tower."""
    named = d.get("architectures")
    alone = NESTED.get(str(named[0])) if isinstance(named, list) and named else None
    text = d.get("text_config")
    if alone is None or not isinstance(text, dict):
        return d
    shared = {key: d[key] for key in _SHARED if d.get(key) is not None}
    return {**text, **shared, "architectures": [alone]}


def read_whole_config(folder: str | PurePath) -> dict[str, Any]:
    """The parsed ``config.json`` of a Hugging Face folder.

    Raises:
        InputError: no such folder or file, or not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise InputError(f"{folder}: no such model folder")
    if not path.is_file():
        raise InputError(f"{path}: no such file; a Hugging Face model folder has one")
    return read_object(path)
