"""Decoding in batches that stay full, with a static key/value cache.

What all prompts begin with is read once. Longest prompts first, ``ADMITTED`` of them at a time are read
and put into free rows of the batch, which then grows by ``CHUNK`` tokens in one loop on the device. Rows
that have ended are handed out and given to the next prompts, and so on.

What a prompt gets does not depend on its neighbours, to the bit. It is read in a batch whose shape its
own length decides and continued in a batch of ``batch_size`` rows, no operation mixes rows, and slots
behind a row's text have attention weight 0. Reading slots is most of a step's work on a CPU, so there the
batch has only as many as its longest text needs at the time. Sums over slots are made in blocks, in order,
and empty blocks change nothing. Elsewhere, and where blocks are so small that the compiler's choice of
kernels depends on their number, the number of slots stays as it is.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key

from panacea_jax import watchdog
from panacea_jax.data.encode import check_ids
from panacea_jax.errors import InputError
from panacea_jax.generate.sample import Sampling, next_token, row_keys
from panacea_jax.generate.schedule import ADMITTED, CHUNK, Answer, Schedule, common_prefix
from panacea_jax.models.adapter import AdapterSet
from panacea_jax.models.attention import SLOT_BLOCK
from panacea_jax.models.bound import Inputs
from panacea_jax.models.cache import (
    KVCache,
    Layers,
    copy_into,
    init_cache,
    insert,
    num_slots,
    settle,
)
from panacea_jax.models.model import Model
from panacea_jax.parallel import batch_sharding, replicated
from panacea_jax.parallel.sharding import ROWS, batch_rows

# Numbers in a device's block of the cache from which the kernels are the same for any number of blocks, by trying (test_attention.py).
GROWS = 2**18
# Sizes that the cache has at most where it grows; each is a compilation.
SIZES = 6

GREEDY = Sampling()


def cache_slots(needed: int, most: int, sizes: int) -> int:
    """Slots of the batch where ``needed`` must fit and ``most`` are the most ever needed; of ``sizes`` at most, each a compilation."""
    step = -(-most // (sizes * SLOT_BLOCK)) * SLOT_BLOCK
    return min(-(-needed // step) * step, -(-most // SLOT_BLOCK) * SLOT_BLOCK)


def _sizes(model: Model, count: int) -> int:
    c = model.config
    share = batch_rows(model.mesh) * (model.mesh.shape["tensor"] if _heads_split(model) else 1)
    large = count * c.num_kv_heads * c.head_dim * SLOT_BLOCK // share >= GROWS
    return SIZES if large and model.mesh.devices.flat[0].platform == "cpu" else 1


class Fresh(NamedTuple):
    """Rows that were just read, P of them; the fields are those of :class:`Rows`."""

    length: Int[Array, "P"]
    last: Int[Array, "P"]
    left: Int[Array, "P"]
    key: Key[Array, "P"]
    adapter: Int[Array, "P"]


class Rows(NamedTuple):
    """The batch on the device.

    Attributes:
        cache: what each row has read.
        last: its newest token, not read yet.
        left: tokens it may still add; 0 for a row that has ended or is idle.
        key: its random key.
        adapter: number of its adapter.
    """

    cache: KVCache
    last: Int[Array, "B"]
    left: Int[Array, "B"]
    key: Key[Array, "B"]
    adapter: Int[Array, "B"]


def generate(
    model: Model,
    weights: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    adapters: Sequence[int] | None = None,
    slots: int = 0,
    shared: int = 0,
    cache_dtype: Any = None,
) -> Iterator[Answer]:
    """Continue every prompt, longest first.

    Args:
        model: gives the graph and the mesh.
        weights: base weights.
        params: adapter, set of adapters, complete weights, or None; as in :meth:`Model.apply`.
        prompts: token ids of each prompt, without padding.
        batch_size: rows decoded together, rounded up to what the mesh divides.
        max_new_tokens: most tokens to add.
        eos_ids: any of these ends a text.
        pad_id: fills up rows; never seen by a text.
        sampling: greedy, or how to draw.
        seed: of the draws.
        indices: number of each prompt, which with ``seed`` decides its draws; by default its place in ``prompts``.
        adapters: for a set of adapters, the number of each prompt's.
        slots: tokens of the longest text, prompt and answer; by default of the longest one here. Give it where prompts of one set come in
            several calls that must agree to the bit.
        shared: how many tokens all prompts begin with that are to be read and kept once, see :func:`common_prefix`. 0 with a set of
            adapters. Decides last bits like ``slots``.
        cache_dtype: of the cache; the compute dtype by default, or int8.

    Yields:
        ``(place of the prompt, ids up to and without the end token, whether it ended by one)``, as the texts end.

    Raises:
        InputError: a prompt without tokens or with an id outside the vocabulary, or a size below 1.
        ValueError: the prompts do not begin as ``shared`` says.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise InputError(
            f"config.generate: batch_size = {batch_size}, max_new_tokens = {max_new_tokens}: "
            "both must be at least 1"
        )
    if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
        raise InputError(f"prompt {empty[0]} has no tokens")
    check_ids(prompts, model.config.vocab_size, "prompts")
    if not prompts:
        return
    if shared > common_prefix(prompts) or (shared and isinstance(params, AdapterSet)):
        raise ValueError(f"the prompts and adapters do not share {shared} tokens")
    begin, prompts = list(prompts[0][:shared]), [prompt[shared:] for prompt in prompts]
    indices = range(len(prompts)) if indices is None else indices
    adapters = [0] * len(prompts) if adapters is None else adapters
    ends = set(eos_ids)
    eos = np.asarray(sorted(ends) or [-1], np.int32)

    # ---- an empty batch
    parts = batch_rows(model.mesh)
    count = -(-batch_size // parts) * parts
    admitted = -(-min(ADMITTED, count) // parts) * parts
    schedule = Schedule(prompts, count, admitted, max_new_tokens)
    most, sizes = max(slots - shared, schedule.most), _sizes(model, count)
    static = dataclasses.replace(model, weights=None, folder=None)
    program = _programs(static, sampling, pad_id)
    unstacked = program.unstack(weights, params)
    kept = program.share(weights, params, np.asarray([begin], np.int32)) if shared else ()
    dtype = jnp.dtype(cache_dtype or model.dtype)
    spare: dict[int, Layers] = {}
    rows = program.empty(count, cache_slots(1, most, sizes), dtype, kept)

    while schedule:
        # ---- free rows go to the next prompts
        new = []
        for group in schedule.admit():
            read = program.prefill(
                weights,
                params,
                kept,
                *_right_padded([prompts[i] for i in group.prompts], admitted, group.width, pad_id),
                _filled([indices[i] for i in group.prompts], admitted, 0),
                _filled([adapters[i] for i in group.prompts], admitted, 0),
                np.int32(seed),
                np.int32(max_new_tokens),
            )
            new.append((read, _filled(group.rows, admitted, count)))
        size = cache_slots(schedule.slots(), most, sizes)
        if size != rows.cache.slots:
            # Arrays of other sizes are kept: to allocate one costs more than to copy it.
            old, into = rows.cache.layers, spare.pop(size, None)
            spare[rows.cache.slots] = old
            into = into or program.empty(count, size, dtype, ()).cache.layers
            rows = rows._replace(cache=rows.cache._replace(layers=program.fit(old, into)))
        for read, target in new:
            rows = program.admit(rows, *read, target)
        # ---- a chunk of tokens
        rows, out = program.extend(weights, params, unstacked, rows, eos)
        out, left = jax.device_get((out, rows.left))
        watchdog.alive()
        yield from schedule.take(out, left, ends)


def _right_padded(
    prompts: Sequence[Sequence[int]], rows: int, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``[rows, width]`` and lengths ``[rows]``; idle rows have length 1."""
    tokens = np.full((rows, width), pad_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, _filled([len(p) for p in prompts], rows, 1)


def _filled(values: Sequence[int], size: int, rest: int) -> np.ndarray:
    """The values, and ``rest`` after them up to ``size``."""
    return np.asarray([*values, *[rest] * (size - len(values))], np.int32)


class Programs(NamedTuple):
    """The compiled functions; each compiles anew for another width or number of slots only."""

    unstack: Callable[[Any, Any], Any]
    share: Callable[[Any, Any, np.ndarray], Layers]
    empty: Callable[[int, int, Any, Layers], Rows]
    fit: Callable[[Layers, Layers], Layers]
    prefill: Callable[..., tuple[Layers, Fresh]]
    admit: Callable[[Rows, Layers, Fresh, np.ndarray], Rows]
    extend: Callable[..., tuple[Rows, Array]]


@functools.lru_cache(maxsize=8)
def _programs(model: Model, sampling: Sampling, pad_id: int) -> Programs:
    """For a model without weights and folder, equal for equal graphs, so that a program is built once."""

    def unstack(weights: Any, params: Any) -> Any:
        # Adapters of several rows hold the same arrays whichever of them a row uses.
        return model.bind(weights, _params(params, jnp.zeros((1,), jnp.int32))).unstack()

    @jax.jit
    def share(weights: Any, params: Any, tokens: Int[Array, "1 T"]) -> Layers:
        """What all prompts begin with."""
        return model.bind(weights, params).prefill(Inputs.of(tokens))

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def empty(count: int, slots: int, dtype: Any, shared: Layers) -> Rows:
        zero = jnp.zeros((count,), jnp.int32)
        cache = init_cache(model.config, count, slots, CHUNK, dtype, shared)
        return _placed(model, Rows(cache, zero, zero, row_keys(0, zero), zero))

    @functools.partial(jax.jit, donate_argnums=1)
    def fit(layers: Layers, into: Layers) -> Layers:
        return _split(model, copy_into(layers, into))

    @jax.jit
    def prefill(
        weights: Any,
        params: Any,
        shared: Layers,
        tokens: Int[Array, "P T"],
        length: Int[Array, "P"],
        index: Int[Array, "P"],
        adapter: Int[Array, "P"],
        seed: Int[Array, ""],
        left: Int[Array, ""],
    ) -> tuple[Layers, Fresh]:
        """Prompts but for their last tokens, which the first decoding step reads."""
        tokens = jax.lax.with_sharding_constraint(tokens, batch_sharding(model.mesh))
        valid = jnp.arange(tokens.shape[1]) < length[:, None] - 1
        inputs = Inputs.of(tokens, valid, first=num_slots(shared), right=True)
        layers = model.bind(weights, _params(params, adapter)).prefill(inputs, shared)
        last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]
        left = jnp.full_like(length, left)
        return layers, Fresh(length - 1, last, left, row_keys(seed, index), adapter)

    @functools.partial(jax.jit, donate_argnums=0)
    def admit(rows: Rows, layers: Layers, new: Fresh, target: Int[Array, "P"]) -> Rows:
        cache = insert(rows.cache, layers, new.length, target)
        put = jax.tree.map(
            lambda old, x: old.at[target].set(x, mode="drop"), rows[1:], tuple(new[1:])
        )
        return _placed(model, Rows(cache, *put))

    @functools.partial(jax.jit, donate_argnums=3)
    def extend(
        weights: Any, params: Any, unstacked: Any, rows: Rows, eos: Int[Array, "E"]
    ) -> tuple[Rows, Int[Array, "B N"]]:
        """Up to ``CHUNK`` tokens a row; -1 after its end."""
        bound = model.bind(weights, _params(params, rows.adapter))

        def going(state: Any) -> Any:
            i, rows, _ = state
            return (i < CHUNK) & jnp.any(rows.left > 0)

        def step(state: Any) -> Any:
            i, rows, out = state
            active = rows.left > 0
            inputs = Inputs.of(rows.last[:, None], first=rows.cache.next[:, None])
            x, cache = bound.hidden(inputs, rows.cache, unstacked)
            assert cache is not None
            logits = bound.logits(x[:, 0])
            token = next_token(logits, rows.key, cache.next, sampling)
            left = jnp.where(active & ~jnp.isin(token, eos), rows.left - 1, 0)
            out = jax.lax.dynamic_update_slice(
                out, jnp.where(active, token, -1)[:, None], (jnp.zeros_like(i), i)
            )
            last = jnp.where(active, token, pad_id)
            return i + 1, Rows(cache, last, left, rows.key, rows.adapter), out

        out = jnp.full((rows.last.shape[0], CHUNK), -1, jnp.int32)
        _, rows, out = jax.lax.while_loop(going, step, (jnp.zeros((), jnp.int32), rows, out))
        rows = rows._replace(cache=settle(rows.cache, jnp.sum(out >= 0, axis=1, dtype=jnp.int32)))
        whole = jax.lax.with_sharding_constraint(out, replicated(model.mesh))
        return _placed(model, rows), whole

    return Programs(jax.jit(unstack), share, empty, fit, prefill, admit, extend)


def _params(params: Any, adapter: Int[Array, "B"]) -> Any:
    return params.of(adapter) if isinstance(params, AdapterSet) else params


def _placed(model: Model, rows: Rows) -> Rows:
    """The cache's rows and heads split like the batch and the key/value projections, the rest on every device."""
    place: Any = jax.lax.with_sharding_constraint
    cache = rows.cache
    length, fresh, *rest = place((cache.length, cache.fresh, *rows[1:]), replicated(model.mesh))
    layers, recent = _split(model, (cache.layers, cache.recent))
    shared = _split(model, cache.shared, rows=None)
    return Rows(KVCache(layers, length, recent, fresh, shared), *rest)


def _split(model: Model, tree: Any, rows: Any = ROWS) -> Any:
    tensor = "tensor" if _heads_split(model) else None
    place: Any = jax.lax.with_sharding_constraint
    return place(tree, NamedSharding(model.mesh, PartitionSpec(rows, tensor)))


def _heads_split(model: Model) -> bool:
    """Whether the tensor axis splits the cache's heads."""
    return bool(model.config.num_kv_heads % model.mesh.shape["tensor"] == 0)
