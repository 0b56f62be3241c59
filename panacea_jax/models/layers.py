"""The parts of a decoder layer. Parameters carry Hugging Face's module names.

Each module is built for a stack of layers (``layers=(L,)``: arrays get a leading axis) and called
on one of them, after the scan in :mod:`panacea_jax.models.decoder` has sliced that axis away.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from panacea_jax.models.attention import attend, attend_in_parts
from panacea_jax.models.cache import KeysValues, Slots, write_slots
from panacea_jax.models.config import ModelConfig
from panacea_jax.models.fused import Fused
from panacea_jax.models.precision import wide
from panacea_jax.models.quantise import Quantised


class LayerCache(NamedTuple):
    """What one layer has read: stretches that stay as they are, and the one that new tokens go into."""

    earlier: tuple[KeysValues, ...]
    recent: KeysValues | None = None


class Context(NamedTuple):
    """What every layer needs and none changes; ``offset`` alone differs from layer to layer.

    Attributes:
        offset: added to the output of the attention module, before the residual (Vaccine).
        readings: names of the activations to hand out, see :func:`read`.
        slot: where new tokens come among the recent ones of the cache.
        valid: False for padding; only where sums over tokens are read.
        fused: what attends in place of the plain way where there is no cache.
        local: cos and sin of the layers with a window, where these turn by a base of their own.
        dropout: of the inputs of adapters that bring keys for it.
    """

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    mask: Bool[Array, "B T S"]
    distance: Int[Array, "B T S"] | None
    slot: Int[Array, ""] | None
    scale: Any
    offset: Float[Array, "B T D"] | None = None
    readings: tuple[str, ...] = ()
    valid: Bool[Array, "B T"] | None = None
    fused: Fused | None = None
    local: tuple[Float[Array, "B T half"], Float[Array, "B T half"]] | None = None
    dropout: float = 0.0

    def angles(self, window: Int[Array, ""] | None) -> tuple[Array, Array]:
        """Cos and sin of the rotation in a layer with this window (0: none)."""
        if self.local is None or window is None:
            return self.cos, self.sin
        cos, sin = self.local
        return jnp.where(window > 0, cos, self.cos), jnp.where(window > 0, sin, self.sin)


def hand_out(module: nnx.Module, context: Context, name: str, value: Array) -> None:
    """Hand out an activation if it is asked for; the decoder collects it from the module after the call."""
    if name in context.readings:
        setattr(module, name, nnx.Intermediate(value))


def hand_out_squares(module: nnx.Module, context: Context, name: str, x: Float[Array, "B T F"]) -> None:
    """Hand out ``Σ x²`` over the valid tokens, ``[F]`` in at least float32, if it is asked for."""
    if name in context.readings and context.valid is not None:
        squares = jnp.square(x.astype(wide(x.dtype)))
        squares = jnp.where(context.valid[..., None], squares, 0)
        hand_out(module, context, name, jnp.sum(squares, axis=(0, 1)))


def hand_out_products(module: nnx.Module, context: Context, name: str, x: Float[Array, "B T F"]) -> None:
    """Hand out ``Σ x xᵀ`` over the valid tokens, ``[F, F]`` in at least float32, if it is asked for."""
    if name in context.readings and context.valid is not None:
        x = jnp.where(context.valid[..., None], x, 0)
        products = jnp.einsum("btf,btg->fg", x, x, preferred_element_type=wide(x.dtype), precision="highest")
        hand_out(module, context, name, products)


def drop(
    x: Float[Array, "B T D"], keys: UInt32[Array, "B _"], rate: float
) -> Float[Array, "B T D"]:
    """Dropout with one raw key for each row: an entry is 0 with probability ``rate``, else divided by 1 − rate."""
    rows = jax.random.wrap_key_data(keys)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(rows)
    return jnp.where(kept, x / (1 - rate), 0)


def rotate(
    x: Float[Array, "B T N hd"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N hd"]:
    """Rotary position embedding; the pairs are (i, i + hd/2), as in Hugging Face's weights."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def activate(name: str, x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """``"silu"``, or GELU in its exact (``"gelu"``) or tanh form (``"gelu_tanh"``)."""
    return jax.nn.silu(x) if name == "silu" else jax.nn.gelu(x, approximate=name == "gelu_tanh")


class Linear(nnx.Module):
    """``y = x W (+ b)``, plus ``scale · (x A) B`` where a LoRA adapter is given.

    Where rows have adapters of their own, A and B hold the factors of all of them side by side, and ``scale [B, 1, r]`` is that of the
    row's adapter on its own ranks and 0 on the others': ``(scale · x A) B``.
    """

    def __init__(self, layers: tuple[int, ...], d_in: int, d_out: int, bias: bool) -> None:
        self.kernel = nnx.Param(jnp.zeros((*layers, d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros((*layers, d_out))) if bias else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        adapter: Mapping[str, Any] | None,
        context: Context,
    ) -> Float[Array, "B T F"]:
        """Apply to ``x``; ``adapter`` is ``{"a": [D, r], "b": [r, F]}``, where ``x`` is dropped for it with ``"keys": [B, …]``, or None."""
        hand_out_squares(self, context, "input_squares", x)
        hand_out_products(self, context, "input_products", x)
        kernel = self.kernel[...]
        if isinstance(kernel, Quantised):
            y = kernel.product(x)
        else:
            y = x @ kernel.astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if adapter is not None:
            kept = drop(x, adapter["keys"], context.dropout) if "keys" in adapter else x
            low = kept @ adapter["a"].astype(x.dtype)
            hand_out_squares(self, context, "low_squares", low)
            scale = jnp.asarray(context.scale, x.dtype)
            b = adapter["b"].astype(x.dtype)
            y = y + ((low * scale) @ b if scale.ndim else scale * (low @ b))
        return y


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467); Gemma multiplies by (1 +
    scale).
    """

    def __init__(self, layers: tuple[int, ...], config: ModelConfig, size: int) -> None:
        self.scale = nnx.Param(jnp.zeros((*layers, size)))
        self.eps = config.rms_norm_eps
        self.unit_offset = config.unit_offset_norm

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Normalise the last axis, in at least float32."""
        y = x.astype(wide(x.dtype))
        normed = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...]
        if (
            self.unit_offset
        ):  # Gemma multiplies before it rounds to the compute dtype, the others after.
            return (normed * (1 + scale.astype(normed.dtype))).astype(x.dtype)
        return scale.astype(x.dtype) * normed.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; Qwen3 and Gemma 3 norm each head of q and k before."""

    def __init__(self, layers: tuple[int, ...], config: ModelConfig) -> None:
        d, heads = config.hidden_size, config.num_heads * config.head_dim
        kv_heads = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(layers, d, heads, config.qkv_bias)
        self.k_proj = Linear(layers, d, kv_heads, config.qkv_bias)
        self.v_proj = Linear(layers, d, kv_heads, config.qkv_bias)
        self.o_proj = Linear(layers, heads, d, config.o_bias)
        self.q_norm = RMSNorm(layers, config, config.head_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(layers, config, config.head_dim) if config.qk_norm else None
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        window: Int[Array, ""] | None,
        adapter: Mapping[str, Any],
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """Attend, also to what the layer's cache holds; returns the output, and the keys and values that are new, behind the recent ones
        if there are such.
        """
        c = self.config

        def project(name: str, linear: Linear) -> Array:
            y = linear(x, adapter.get(name), context)
            return y.reshape(*x.shape[:2], -1, c.head_dim)

        def rotated(name: str, linear: Linear, norm: RMSNorm | None) -> Array:
            y = project(name, linear)
            return rotate(y if norm is None else norm(y), *context.angles(window))

        q = rotated("q_proj", self.q_proj, self.q_norm)
        k = rotated("k_proj", self.k_proj, self.k_norm)
        v = project("v_proj", self.v_proj)
        # Heads before slots: a decoding step then reads the cache as it lies, without a copy.
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        mask = context.mask
        if window is not None and context.distance is not None:
            mask = mask & ((window == 0) | (context.distance < window))
        new = Slots(k), Slots(v)
        if cache is None and context.fused is not None:
            out = context.fused(q, k, v, window)
        elif cache is None:
            out = attend(q, k, v, mask, c.query_scale, c.attention_softcap)
        else:
            if cache.recent is not None and context.slot is not None:
                recent_k, recent_v = cache.recent
                new = write_slots(recent_k, k, context.slot), write_slots(recent_v, v, context.slot)
            keys, values = zip(*cache.earlier, new)
            out = attend_in_parts(q, keys, values, mask, c.query_scale, c.attention_softcap)
        out = self.o_proj(out.reshape(*x.shape[:2], -1), adapter.get("o_proj"), context)
        if context.offset is not None:
            out = out + context.offset.astype(out.dtype)
        hand_out(self, context, "attn_out", out)
        return out, new


class MLP(nnx.Module):
    """Gated MLP: ``down(act(gate x) · up x)`` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, layers: tuple[int, ...], config: ModelConfig) -> None:
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(layers, d, f, config.mlp_bias)
        self.up_proj = Linear(layers, d, f, config.mlp_bias)
        self.down_proj = Linear(layers, f, d, config.mlp_bias)
        self.activation = config.activation

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, adapter: Mapping[str, Any]
    ) -> Float[Array, "B T D"]:
        """Apply to ``x``."""
        gate = activate(self.activation, self.gate_proj(x, adapter.get("gate_proj"), context))
        up = self.up_proj(x, adapter.get("up_proj"), context)
        out = self.down_proj(gate * up, adapter.get("down_proj"), context)
        hand_out(self, context, "mlp_out", out)
        return out


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm and in a residual; Gemma 2 and 3 norm their outputs too."""

    def __init__(self, layers: tuple[int, ...], config: ModelConfig) -> None:
        self.self_attn = Attention(layers, config)
        self.mlp = MLP(layers, config)
        self.input_layernorm = RMSNorm(layers, config, config.hidden_size)
        # By Hugging Face's names: the norm before the MLP, except in Gemma 2 and 3, where it follows
        # attention.
        self.post_attention_layernorm = RMSNorm(layers, config, config.hidden_size)
        if config.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(layers, config, config.hidden_size)
            self.post_feedforward_layernorm = RMSNorm(layers, config, config.hidden_size)
        self.post_norms = config.post_norms

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        window: Int[Array, ""] | None,
        adapter: Mapping[str, Any],
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """Apply to the residual stream ``x``; returns it, and the layer's keys and values."""
        with jax.named_scope("self_attn"):
            normed = self.input_layernorm(x)
            out, kv = self.self_attn(normed, context, window, adapter.get("self_attn", {}), cache)
        with jax.named_scope("mlp"):
            mlp_adapter = adapter.get("mlp", {})
            if self.post_norms:
                x = x + self.post_attention_layernorm(out)
                out = self.mlp(self.pre_feedforward_layernorm(x), context, mlp_adapter)
                x = x + self.post_feedforward_layernorm(out)
            else:
                x = x + out
                x = x + self.mlp(self.post_attention_layernorm(x), context, mlp_adapter)
        hand_out(self, context, "block_out", x)
        return x, kv
