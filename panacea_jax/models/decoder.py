"""The one decoder: Llama, Mistral, Qwen2, Gemma and Gemma 2 are settings of it.

A pre-norm transformer with rotary positions, grouped-query attention and a gated MLP. Its
parameters carry Hugging Face's module names, with all layers stacked on axis 0 of each array; one
:class:`DecoderLayer` is scanned over them, so neither the program nor its compile time grows with
depth. Only a step through the key/value cache is written out layer by layer. Numbers are computed
in ``dtype``; norms, rotary angles, softmax and logits in at least float32.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from panacea_jax.errors import InputError
from panacea_jax.models.cache import KVCache, Layers, num_slots
from panacea_jax.models.config import ModelConfig
from panacea_jax.models.fused import BACKENDS, choose, fused_attention
from panacea_jax.models.layers import Context, DecoderLayer, LayerCache, Linear, RMSNorm, wide
from panacea_jax.parallel.sharding import batch_rows, batch_sharding

# Activations that a defence may ask for, [L, B, T, D]: outputs of the attention module (before the residual), of the MLP, of the layer.
READINGS = ("attn_out", "mlp_out", "block_out")
# Sums of squares over the valid tokens, {"self_attn.q_proj": [L, F], …}: of each projection's input, and of x A of each adapted one.
SQUARES = ("input_squares", "low_squares")

REMAT = ("none", "dots", "full")


class SomeOffsets(NamedTuple):
    """Offsets of some layers only; which ones may change without a new compilation.

    Attributes:
        values: one for each of the S layers.
        layers: their numbers, all different.
    """

    values: Float[Array, "S B T D"]
    layers: Int[Array, "S"]


Offsets = Float[Array, "L B T D"] | SomeOffsets


class Embedding(nnx.Module):
    """Token embedding table ``[V, D]``."""

    def __init__(self, config: ModelConfig) -> None:
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size)))


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
        # Set where weights are bound: the graph is the same on every mesh.
        self.mesh: Mesh | None = None
        self.remat = remat
        if attention not in BACKENDS:
            raise InputError(f"config.model.attention = {attention}: one of {', '.join(BACKENDS)}")
        self.attention = attention
        self.embed_tokens = Embedding(config)
        self.layers = DecoderLayer((config.num_layers,), config)
        self.norm = RMSNorm((), config)
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

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        adapter: Mapping[str, Any] | None = None,
        scale: Any = 1.0,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T V"], KVCache | None]:
        """Logits of every position, in at least float32; see :meth:`hidden` for the arguments."""
        x, cache = self.hidden(tokens, positions, valid, adapter, scale, cache)
        return self.logits(x), cache

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        adapter: Mapping[str, Any] | None = None,
        scale: Any = 1.0,
        cache: KVCache | None = None,
        apart: Any = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Final hidden states (after the last norm), and the cache if there is one.

        Args:
            tokens: token ids; those of padding do not matter.
            positions: position of each token in its text.
            valid: False for padding: no query sees it.
            adapter: LoRA factors ``{"self_attn": {"q_proj": {"a": [L, in, r], "b": [L, r, out]},
                …}, "mlp": …}``.
            scale: α/r of the adapter.
            cache: keys and values of earlier tokens; the new ones come behind the recent ones. Then ``positions`` go on from theirs, and
                no token is padding.
            apart: with a cache, what :meth:`apart` gave; by default it is made here.
        """
        x = self.embed(tokens)
        if cache is None:
            context, windows = self._whole_context(positions, valid, scale)
            x, _, _ = self._scan_layers(x, context, windows, adapter or {}, False, None, self.remat)
        else:
            (b, t), first = tokens.shape, num_slots(cache.shared)
            settled = jnp.arange(cache.slots, dtype=jnp.int32)
            recent = jnp.arange(num_slots(cache.recent), dtype=jnp.int32)
            known = [settled < cache.length[:, None], recent[None] < cache.fresh + t]
            where = [first + settled[None], first + cache.length[:, None] + recent]
            seen, at = _after(cache.shared, _joined(known, b), _joined(where, b))
            context, windows = self._context(positions, at, seen, cache.fresh, scale)
            x, new = self._each_layer(x, context, windows, apart or self.apart(adapter), cache)
            cache = cache._replace(recent=new, fresh=cache.fresh + t)
        with jax.named_scope("norm"):
            return self.norm(x), cache

    def read(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        adapter: Mapping[str, Any] | None = None,
        scale: Any = 1.0,
        shared: Layers = (),
    ) -> Layers:
        """Keys and values of the tokens in every layer, behind those that all rows share; padding comes last. For the other arguments
        see :meth:`hidden`.
        """
        if shared:
            seen, at = _after(shared, valid, positions)
            context, windows = self._context(positions, at, seen, None, scale)
        else:
            context, windows = self._whole_context(positions, valid, scale)
        x = self.embed(tokens)
        _, kv, _ = self._scan_layers(
            x, context, windows, adapter or {}, True, None, self.remat, shared
        )
        assert kv is not None
        return kv

    def inspect(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        adapter: Mapping[str, Any] | None = None,
        scale: Any = 1.0,
        offsets: Offsets | None = None,
        readings: tuple[str, ...] = (),
        remat: str | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Final hidden states with activations perturbed and read on the way.

        Args:
            tokens, positions, valid, adapter, scale: as of :meth:`hidden`.
            offsets: added to the output of each attention module, before the residual.
            readings: which of ``READINGS`` and ``SQUARES`` to return.
            remat: what the backward pass recomputes; by default what the model was made for.
            segments: numbers of the texts that share a row; a query sees keys of its own only. None: one text a row.

        Returns:
            The hidden states, and by name what was asked for, stacked over layers.
        """
        x = self.embed(tokens)
        context, windows = self._whole_context(positions, valid, scale, segments)
        context = context._replace(readings=readings, valid=valid)
        x, _, read = self._scan_layers(
            x, context, windows, adapter or {}, False, offsets, remat or self.remat
        )
        with jax.named_scope("norm"):
            return self.norm(x), read

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What enters the first layer."""
        x = self.embed_tokens.embedding[...][tokens].astype(self.dtype)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(self.config.hidden_size), self.dtype)
        return self._by_rows(x)

    def _by_rows(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Keep the residual stream split by rows like the batch.

        Left to itself the compiler splits its last axis as the weights' first one is, ``fsdp`` then acts like a second ``tensor``, and
        every layer exchanges activations of the whole batch in place of its weights.
        """
        if self.mesh is None or x.shape[0] % batch_rows(self.mesh):
            return x
        return jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh))

    def logits(self, x: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Logits of (a slice of) the final hidden states, in at least float32: over the vocabulary,
        or over the labels of a classifier.
        """
        head = self.lm_head if self.score is None else self.score
        with jax.named_scope("lm_head"):
            out_dtype = wide(self.dtype)
            if head is None:
                table = self.embed_tokens.embedding[...].astype(x.dtype)
                out = jnp.einsum("...d,vd->...v", x, table, preferred_element_type=out_dtype)
            else:
                kernel = head.kernel[...].astype(x.dtype)
                out = jnp.einsum("...d,dv->...v", x, kernel, preferred_element_type=out_dtype)
            cap = self.config.final_softcap
            return out if cap is None or self.score is not None else jnp.tanh(out / cap) * cap

    def _context(
        self,
        positions: Int[Array, "B T"],
        key_positions: Int[Array, "_ S"],
        key_valid: Bool[Array, "B S"],
        slot: Int[Array, ""] | None,
        scale: Any,
    ) -> tuple[Context, Int[Array, "L"] | None]:
        """Rotary angles, mask and, where layers differ in it, the window of each layer."""
        angle_dtype = wide(self.dtype)
        frequencies = jnp.asarray(self.config.rope_frequencies(), angle_dtype)
        angles = positions[..., None].astype(angle_dtype) * frequencies
        distance = positions[:, :, None] - key_positions[:, None, :]
        mask = key_valid[:, None, :] & (distance >= 0)
        windows = None
        if self.config.windows is not None:
            if len(set(self.config.windows)) == 1:
                mask = mask & (distance < self.config.windows[0])
            else:
                windows = jnp.asarray(self.config.windows, jnp.int32)
        per_layer = None if windows is None else distance
        return Context(jnp.cos(angles), jnp.sin(angles), mask, per_layer, slot, scale), windows

    def _whole_context(
        self,
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        scale: Any,
        segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Context, Int[Array, "L"] | None]:
        """The same for whole texts, one a row or one a segment, which see nothing but themselves: a fused back-end may attend."""
        context, windows = self._context(positions, positions, valid, None, scale)
        if segments is None:
            segments = valid.astype(jnp.int32)
        else:
            own = segments[:, :, None] == segments[:, None, :]
            context = context._replace(mask=context.mask & own)
        if self.mesh is None:
            return context, windows
        device = self.mesh.devices.flat[0]
        backend = choose(self.attention, self.config, self.dtype, device).name
        if backend != "xla":
            fused = fused_attention(
                backend, self.config, self.mesh, segments, context.mask, context.distance
            )
            context = context._replace(fused=fused)
        return context, windows

    def _scan_layers(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        windows: Int[Array, "L"] | None,
        adapter: Mapping[str, Any],
        keep: bool,
        offsets: Offsets | None,
        remat: str,
        shared: Layers = (),
    ) -> tuple[Float[Array, "B T D"], Layers | None, dict[str, Any]]:
        """Scan one layer's program over the stacked weights, adapters, windows, offsets and shared keys and values."""
        graph, stacked = nnx.split(self.layers)
        n = self.config.num_layers
        some = offsets if isinstance(offsets, SomeOffsets) else None
        offset_xs = offsets if some is None else _places(some.layers, n)

        def body(x: Any, per_layer: Any) -> tuple[Any, Any]:
            weights, factors, window, offset, earlier = per_layer
            cache = None if earlier is None else LayerCache((earlier,))
            if some is not None:
                offset = some.values.at[offset].get(mode="fill", fill_value=0)
            layer = nnx.merge(graph, weights)
            x, kv = layer(x, context._replace(offset=offset), window, factors, cache)
            return self._by_rows(x), (kv if keep else None, _collect(layer))

        if remat == "full":
            body = jax.checkpoint(body, prevent_cse=False)
        elif remat == "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        with jax.named_scope("layers"):
            stack = jax.tree.map(lambda *x: jnp.stack(x), *shared) if shared else None
            xs = (stacked, dict(adapter), windows, offset_xs, stack)
            x, (kv, read) = jax.lax.scan(body, x, xs)
        return x, tuple(_of_layer(kv, i) for i in range(n)) if keep else None, read

    def apart(self, adapter: Mapping[str, Any] | None) -> tuple[Any, ...]:
        """Weights and factors of each layer, cut out of their stacks. A loop over tokens does so once, before it begins: inside, every
        layer would be copied at every token.
        """
        stacked = (nnx.split(self.layers)[1], dict(adapter or {}))
        return tuple(_of_layer(stacked, i) for i in range(self.config.num_layers))

    def _each_layer(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        windows: Int[Array, "L"] | None,
        apart: tuple[Any, ...],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T D"], Layers]:
        """The layers one after the other, through the cache; with their recent keys and values."""
        graph, _ = nnx.split(self.layers)
        written = []
        for i, (weights, factors) in enumerate(apart):
            window = None if windows is None else windows[i]
            earlier = (*cache.shared[i : i + 1], cache.layers[i])
            layer_cache = LayerCache(earlier, cache.recent[i])
            with jax.named_scope(f"layer_{i}"):
                x, kv = nnx.merge(graph, weights)(x, context, window, factors, layer_cache)
                x = self._by_rows(x)
            written.append(kv)
        return x, tuple(written)


def _joined(parts: list[Array], rows: int) -> Array:
    """``[B or 1, Sᵢ]`` side by side."""
    return jnp.concatenate([jnp.broadcast_to(x, (rows, x.shape[1])) for x in parts], axis=1)


def _after(
    shared: Layers, valid: Bool[Array, "B S"], positions: Int[Array, "B S"]
) -> tuple[Bool[Array, "B R"], Int[Array, "B R"]]:
    """Which keys count, and their positions, with the shared ones in front."""
    count = num_slots(shared)
    if not count:
        return valid, positions
    ahead = jnp.arange(count, dtype=jnp.int32)[None]
    rows = len(valid)
    return _joined([ahead >= 0, valid], rows), _joined([ahead, positions], rows)


def _places(layers: Int[Array, "S"], n: int) -> Int[Array, "L"]:
    """For each of n layers its place in ``layers``; S, which is beyond the end, where it is not there."""
    count = layers.shape[0]
    return jnp.full(n, count, jnp.int32).at[layers].set(jnp.arange(count, dtype=jnp.int32))


def _of_layer(stacked: Any, i: int) -> Any:
    """Layer ``i`` of a tree of stacks."""
    return jax.tree.map(lambda x: x[i], stacked)


def _collect(layer: nnx.Module) -> dict[str, Any]:
    """What the modules of a layer handed out, by name; of ``SQUARES`` by projection below that."""
    found: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(nnx.pop(layer, nnx.Intermediate)):
        *where, name = map(str, path)
        if name in SQUARES:
            found.setdefault(name, {})[".".join(where)] = variable[...]
        else:
            found[name] = variable[...]
    return found
