"""The decoder with its weights, its adapter and its mesh: the one place where they come together, and every pass through the layers.

One :class:`DecoderLayer` is scanned over the stacked layers, so neither the program nor its compile time grows with depth. Only a step
through the key/value cache is written out layer by layer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from panacea_jax.models.adapter import BLOCK_OF, spread
from panacea_jax.models.cache import KVCache, Layers, num_slots
from panacea_jax.models.decoder import Decoder
from panacea_jax.models.fused import choose_backend, fused_attention
from panacea_jax.models.inputs import Inputs
from panacea_jax.models.layers import Context, LayerCache
from panacea_jax.models.precision import wide
from panacea_jax.parallel.sharding import batch_rows, batch_sharding

# Activations that a defence may ask for, [L, B, T, D]: outputs of the attention module (before the residual), of the MLP, of the layer.
READINGS = ("attn_out", "mlp_out", "block_out")
# Sums over the valid tokens, {"self_attn.q_proj": [L, F], …}: of squares of each projection's input, and of x A of each adapted one; and
# of the input's products of two entries, [L, F, F].
SUMS = ("input_squares", "low_squares", "input_products")
# Weights of one layer that are looked up in their stacks: the backward pass looks them up again, or it would keep a copy of them all.
_LOOKED_UP = "layer_weights"


class SomeOffsets(NamedTuple):
    """Offsets of some layers only; which ones may change without a new compilation.

    Attributes:
        values: one for each of the S layers.
        layers: their numbers, all different.
    """

    values: Float[Array, "S B T D"]
    layers: Int[Array, "S"]


Offsets = Float[Array, "L B T D"] | SomeOffsets


@dataclasses.dataclass(frozen=True)
class BoundDecoder:
    """A decoder with its weights in it, the factors that its projections add, and the mesh that rows are split over.

    Attributes:
        decoder: with weights.
        adapter: LoRA factors ``{"self_attn": {"q_proj": {"a": [S, in, r], "b": [S, r, out]}, …}, "mlp": …}``, or None.
        scale: α/r of the adapter, or of each row's.
        mesh: devices.
        dropout: of the adapter's inputs, where the texts bring keys for it.
        numbers: of the S layers that are adapted, rising; None: all.
    """

    decoder: Decoder
    adapter: Mapping[str, Any] | None
    scale: Any
    mesh: Mesh
    dropout: float = 0.0
    numbers: tuple[int, ...] | None = None

    @property
    def lowest(self) -> int:
        """The lowest layer that the adapter changes: what enters it does not depend on the adapter."""
        return self.numbers[0] if self.numbers else 0

    def hidden(
        self, inputs: Inputs, cache: KVCache | None = None, unstacked: Any = None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Final hidden states (after the last norm), and the cache if there is one.

        Args:
            inputs: one text a row.
            cache: keys and values of earlier tokens; the new ones come behind the recent ones. Then positions go on from theirs, and no
                token is padding.
            unstacked: with a cache, what :meth:`unstack` gave; by default it is made here.
        """
        if cache is None:
            return self.inspect(inputs)[0], None
        x = self.embed(inputs.tokens)
        (b, t), first = inputs.tokens.shape, num_slots(cache.shared)
        settled = jnp.arange(cache.slots, dtype=jnp.int32)
        recent = jnp.arange(num_slots(cache.recent), dtype=jnp.int32)
        known = [settled < cache.length[:, None], recent[None] < cache.fresh + t]
        where = [first + settled[None], first + cache.length[:, None] + recent]
        seen, at = _after(cache.shared, _joined(known, b), _joined(where, b))
        context, windows = self._context(inputs.positions, at, seen, cache.fresh)
        x, new = self._each_layer(x, context, windows, unstacked or self.unstack(), cache)
        cache = cache._replace(recent=new, fresh=cache.fresh + t)
        return self.norm(x), cache

    def prefill(self, inputs: Inputs, shared: Layers = ()) -> Layers:
        """Keys and values of the tokens in every layer, behind those that all rows share; padding comes last."""
        if shared:
            seen, at = _after(shared, inputs.valid, inputs.positions)
            context, windows = self._context(inputs.positions, at, seen, None)
        else:
            context, windows = self._whole_context(inputs)
        x = self.embed(inputs.tokens)
        _, kv, _ = self._scan_layers(x, context, windows, keep=True, shared=shared)
        assert kv is not None
        return kv

    def inspect(
        self,
        inputs: Inputs,
        offsets: Offsets | None = None,
        readings: tuple[str, ...] = (),
        remat: str | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Final hidden states with activations perturbed and read on the way.

        Args:
            inputs: texts.
            offsets: added to the output of each attention module, before the residual.
            readings: which of ``READINGS`` and ``SUMS`` to return.
            remat: what the backward pass recomputes; by default what the model was made for.

        Returns:
            The hidden states, and by name what was asked for, stacked over layers; ``low_squares`` from the lowest adapted one on.
        """
        x, spans = self.embed(inputs.tokens), self._spans()
        if inputs.entering is not None and self.lowest and offsets is None and not readings:
            x, spans = self._by_rows(inputs.entering.astype(x.dtype)), spans[-1:]
        context, windows = self._whole_context(inputs)
        context = context._replace(readings=readings, valid=inputs.valid, dropout=self.dropout)
        factors = self._factors(inputs.dropout)
        x, _, read = self._scan_layers(
            x, context, windows, spans=spans, factors=factors, offsets=offsets, remat=remat
        )
        return self.norm(x), read

    def entering(self, inputs: Inputs) -> Float[Array, "B T D"]:
        """What enters the lowest adapted layer."""
        context, windows = self._whole_context(inputs)
        return self._scan_layers(self.embed(inputs.tokens), context, windows, spans=self._spans()[:-1])[0]

    def one_layer(
        self,
        x: Float[Array, "B T D"],
        inputs: Inputs,
        number: int | Int[Array, ""],
        place: int | Int[Array, ""] | None = None,
        readings: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """What leaves a layer, and what was read in it: for whoever goes through the model layer by layer. One program serves all layers.

        Args:
            x: what enters the layer.
            inputs: the texts.
            number: of the layer.
            place: where its weights lie in the stacks; by default at its number.
            readings: as of :meth:`inspect`.
        """
        context, windows = self._whole_context(inputs)
        context = context._replace(readings=readings, valid=inputs.valid)
        graph, stacked = nnx.split(self.decoder.layers)
        layer = nnx.merge(graph, _of_layer(stacked, number if place is None else place))
        factors = spread(self.adapter or {}, self.numbers, range(self.decoder.config.num_layers))
        window = None if windows is None else windows[number]
        x, _ = layer(x, context, window, _of_layer(factors, number), None)
        return self._by_rows(x), _collect(layer)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What enters the first layer."""
        return self._by_rows(self.decoder.embed(tokens))

    def norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The last norm, of any hidden states."""
        with jax.named_scope("norm"):
            return self.decoder.norm(x)

    def logits(self, x: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Logits of any slice of the final hidden states, in at least float32."""
        return self.decoder.head(x)

    def unstack(self) -> tuple[Any, ...]:
        """Weights and factors of each layer, cut out of their stacks. A loop over tokens does so once, before it begins: inside, every
        layer would be copied at every token.
        """
        weights, n = nnx.split(self.decoder.layers)[1], self.decoder.config.num_layers
        places = {layer: i for i, layer in enumerate(range(n) if self.numbers is None else self.numbers)}
        factors = dict(self.adapter or {})
        return tuple(
            (_of_layer(weights, i), _of_layer(factors, places[i]) if i in places else {})
            for i in range(n)
        )

    def _spans(self) -> tuple[range, ...]:
        """The layers in stretches that are scanned one after the other: those below the lowest adapted one, and the others."""
        lowest, n = self.lowest, self.decoder.config.num_layers
        return (range(lowest), range(lowest, n)) if lowest else (range(n),)

    def _factors(self, keys: UInt32[Array, "B _"] | None) -> dict[str, Any]:
        """The adapter's factors; with dropout also raw keys ``[S, B, …]``, different in every layer, projection and row."""
        factors = dict(self.adapter or {})
        if keys is None or not self.dropout:
            return factors
        rows, n = jax.random.wrap_key_data(keys), self.decoder.config.num_layers
        own_layers = jnp.arange(n) if self.numbers is None else jnp.asarray(self.numbers)
        for number, (target, block) in enumerate(BLOCK_OF.items()):
            if target in factors.get(block, {}):
                numbers = number * n + own_layers
                fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
                own = {"keys": jax.random.key_data(fold(rows, numbers))}
                factors[block] = factors[block] | {target: factors[block][target] | own}
        return factors

    def _by_rows(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Keep the residual stream split by rows like the batch.

        Left to itself the compiler splits its last axis as the weights' first one is, ``fsdp`` then acts like a second ``tensor``, and
        every layer exchanges activations of the whole batch in place of its weights.
        """
        if x.shape[0] % batch_rows(self.mesh):
            return x
        return jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh))

    def _context(
        self,
        positions: Int[Array, "B T"],
        key_positions: Int[Array, "_ S"],
        key_valid: Bool[Array, "B S"],
        slot: Int[Array, ""] | None,
    ) -> tuple[Context, Int[Array, "L"] | None]:
        """Rotary angles, mask and, where layers differ in it, the window of each layer."""
        config, angle_dtype = self.decoder.config, wide(self.decoder.dtype)

        def turn(local: bool = False) -> tuple[Array, Array]:
            frequencies = jnp.asarray(config.rope_frequencies(local), angle_dtype)
            angles = positions[..., None].astype(angle_dtype) * frequencies
            return jnp.cos(angles), jnp.sin(angles)

        distance = positions[:, :, None] - key_positions[:, None, :]
        mask = key_valid[:, None, :] & (distance >= 0)
        windows = None
        if config.windows is not None:
            if len(set(config.windows)) == 1:
                mask = mask & (distance < config.windows[0])
            else:
                windows = jnp.asarray(config.windows, jnp.int32)
        per_layer = None if windows is None else distance
        local = None if config.local_rope_theta is None else turn(local=True)
        return Context(*turn(), mask, per_layer, slot, self.scale, local=local), windows

    def _whole_context(self, inputs: Inputs) -> tuple[Context, Int[Array, "L"] | None]:
        """The same for whole texts, one a row or one a segment, which see nothing but themselves: a fused back-end may attend."""
        positions, segments = inputs.positions, inputs.segments
        context, windows = self._context(positions, positions, inputs.valid, None)
        lengths = None
        if segments is None:
            segments = inputs.valid.astype(jnp.int32)
            lengths = segments.sum(axis=1) if inputs.right else None
        else:
            own = segments[:, :, None] == segments[:, None, :]
            context = context._replace(mask=context.mask & own)
        d, device = self.decoder, self.mesh.devices.flat[0]
        backend = choose_backend(d.attention, d.config, d.dtype, device).name
        if backend != "xla":
            fused = fused_attention(
                backend, d.config, self.mesh, segments, context.mask, context.distance, lengths
            )
            context = context._replace(fused=fused)
        return context, windows

    def _scan_layers(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        windows: Int[Array, "L"] | None,
        *,
        spans: tuple[range, ...] | None = None,
        keep: bool = False,
        factors: Mapping[str, Any] | None = None,
        offsets: Offsets | None = None,
        remat: str | None = None,
        shared: Layers = (),
    ) -> tuple[Float[Array, "B T D"], Layers | None, dict[str, Any]]:
        """Scan one layer's program over the stacked weights, adapters, windows, offsets and shared keys and values.

        Of layers below the lowest adapted one there is no backward pass, unless something else asks for it: nothing in their scan is
        trained. A part of the stacks is looked up layer by layer, since a slice of them would be a copy.
        """
        graph, stacked = nnx.split(self.decoder.layers)
        remat = remat or self.decoder.remat
        n = self.decoder.config.num_layers
        some = offsets if isinstance(offsets, SomeOffsets) else None
        offset_xs = offsets if some is None else _places(some.layers, n)
        spans = self._spans() if spans is None else spans
        split = len(spans[0]) < n

        def body(x: Any, per_layer: Any) -> tuple[Any, Any]:
            weights, factors, window, offset, earlier = per_layer
            if split:
                weights = _looked_up(stacked, weights)
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
        elif split:
            policy = jax.checkpoint_policies.save_anything_except_these_names(_LOOKED_UP)
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        with jax.named_scope("layers"):
            stack = jax.tree.map(lambda *x: jnp.stack(x), *shared) if shared else None
            factors = dict(self.adapter or {}) if factors is None else factors
            found = []
            for span in spans:
                own = spread(factors, self.numbers, span) if span.stop > self.lowest else {}
                rest = (windows, offset_xs, stack)
                if split:
                    xs = (jnp.arange(span.start, span.stop), own, *_of_span(rest, span))
                else:
                    xs = (stacked, own, *rest)
                x, out = jax.lax.scan(body, x, xs)
                found.append(out)
            kv, read = found[0] if len(found) == 1 else _end_to_end(*found)
        return x, tuple(_of_layer(kv, i) for i in range(n)) if keep else None, read

    def _each_layer(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        windows: Int[Array, "L"] | None,
        unstacked: tuple[Any, ...],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T D"], Layers]:
        """The layers one after the other, through the cache; with their recent keys and values."""
        graph, _ = nnx.split(self.decoder.layers)
        written = []
        for i, (weights, factors) in enumerate(unstacked):
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


def _of_span(stacked: Any, span: range) -> Any:
    """Some layers of a tree of stacks."""
    return jax.tree.map(lambda x: x[span.start : span.stop], stacked)


def _looked_up(stacked: Any, i: Int[Array, ""]) -> Any:
    """The weights of layer ``i``, under a name."""

    def look_up(x: Array) -> Array:
        return checkpoint_name(jax.lax.dynamic_index_in_dim(x, i, keepdims=False), _LOOKED_UP)

    return jax.tree.map(look_up, stacked)


def _end_to_end(below: tuple[Any, Any], above: tuple[Any, Any]) -> tuple[Any, Any]:
    """Keys and values, and readings, of two scans as of one; what is read above only (of adapted projections) stays so."""
    (low_kv, low), (high_kv, high) = below, above

    def join(a: Any, b: Any) -> Any:
        return jax.tree.map(lambda *x: jnp.concatenate(x), a, b)

    def read(a: Any, b: Any) -> Any:
        if isinstance(b, dict):
            return {k: read(a[k], x) if k in a else x for k, x in b.items()}
        return join(a, b)

    return join(low_kv, high_kv), read(low, high)


def _of_layer(stacked: Any, i: int | Int[Array, ""]) -> Any:
    """Layer ``i`` of a tree of stacks."""
    return jax.tree.map(lambda x: x[i], stacked)


def _collect(layer: nnx.Module) -> dict[str, Any]:
    """What the modules of a layer handed out, by name; of ``SUMS`` by projection below that."""
    found: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(nnx.pop(layer, nnx.Intermediate)):
        *where, name = map(str, path)
        if name in SUMS:
            found.setdefault(name, {})[".".join(where)] = variable[...]
        else:
            found[name] = variable[...]
    return found
