"""Greedy decoding in batches, with a static key/value cache.

Prompts are grouped by the power of two that holds them and left-padded to it, and every batch has
the same number of rows. So one program is compiled per group, whatever the data, and what a prompt
gets never depends on which prompts it shares a batch with.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from panacea_jax.errors import InputError
from panacea_jax.models.cache import KVCache, init_cache
from panacea_jax.models.model import Model, default_positions
from panacea_jax.parallel import batch_sharding, replicated
from panacea_jax.parallel.sharding import batch_rows

# The shortest bucket: below it, another compilation would cost more than the padding.
MIN_BUCKET = 16

Result = tuple[int, list[int], bool]


def bucket(length: int) -> int:
    """Length that a prompt is padded to: the next power of two, at least ``MIN_BUCKET``."""
    return max(MIN_BUCKET, 1 << (length - 1).bit_length())


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
    on_result: Callable[[int, list[int], bool], None] | None = None,
) -> Iterator[Result]:
    """Continue every prompt with its most likely tokens, shortest prompts first.

    Args:
        model: gives the graph and the mesh.
        weights: base weights.
        params: adapter, complete weights, or None; as in :meth:`Model.apply`.
        prompts: token ids of each prompt, without padding.
        batch_size: rows per batch, rounded up to what the mesh divides; a last short batch is
            filled with idle rows.
        max_new_tokens: most tokens to add.
        eos_ids: any of these ends a text.
        pad_id: fills up rows; never seen by the model.
        on_result: called with each result as well.

    Yields:
        ``(index of the prompt, ids up to and without the end token, whether it ended by one)``.

    Raises:
        InputError: a prompt without tokens or with an id outside the vocabulary, or a size below 1.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise InputError(
            f"config.generate: batch_size = {batch_size}, max_new_tokens = {max_new_tokens}: "
            "both must be at least 1"
        )
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        _check(i, prompt, model.config.vocab_size)
        groups.setdefault(bucket(len(prompt)), []).append(i)
    sharding = batch_sharding(model.mesh)
    parts = batch_rows(model.mesh)
    rows = -(-batch_size // parts) * parts
    decode = _program(_Static(model), max_new_tokens, pad_id)
    eos = jnp.asarray(sorted(set(eos_ids)) or [-1], jnp.int32)
    for length in sorted(groups):
        for start in range(0, len(groups[length]), rows):
            chosen = groups[length][start : start + rows]
            tokens, valid = _left_padded([prompts[i] for i in chosen], rows, length, pad_id)
            batch = jax.device_put((tokens, valid, np.arange(rows) < len(chosen)), sharding)
            out, count, finished = jax.device_get(decode(weights, params, *batch, eos))
            for row, i in enumerate(chosen):
                result = (i, out[row, : count[row]].tolist(), bool(finished[row]))
                if on_result is not None:
                    on_result(*result)
                yield result


def _check(i: int, prompt: Sequence[int], vocab_size: int) -> None:
    if not len(prompt):
        raise InputError(f"prompt {i} has no tokens")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise InputError(
            f"prompt {i} has a token id outside the model's vocabulary of {vocab_size}; "
            "is this the model's own tokenizer?"
        )


def _left_padded(
    prompts: Sequence[Sequence[int]], rows: int, length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and validity ``[rows, length]``; all padding comes first, so all rows end together."""
    tokens = np.full((rows, length), pad_id, np.int32)
    valid = np.zeros((rows, length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        valid[row, length - len(prompt) :] = True
    return tokens, valid


class _Static:
    """The static part of a model, equal for equal graphs, so that a program is built once."""

    def __init__(self, model: Model) -> None:
        self.config, self.graphdef = model.config, model.graphdef
        self.dtype, self.mesh = model.dtype, model.mesh

    def __hash__(self) -> int:
        return hash((self.graphdef, self.mesh))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Static)
            and self.graphdef == other.graphdef
            and self.mesh == other.mesh
        )

    def model(self) -> Model:
        """A model without weights."""
        return Model(self.config, self.graphdef, None, self.dtype, self.mesh)


@functools.lru_cache(maxsize=8)
def _program(static: _Static, max_new_tokens: int, pad_id: int) -> Callable[..., Any]:
    """The compiled decoder: prompts in, ``(tokens, count, finished)`` out, cache kept inside."""
    model = static.model()

    def run(
        weights: Any,
        params: Any,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        active: Bool[Array, "B"],
        eos: Int[Array, "E"],
    ) -> tuple[Int[Array, "B N"], Int[Array, "B"], Bool[Array, "B"]]:
        step = functools.partial(_step, model, weights, params)
        with jax.named_scope("prefill"):
            positions = default_positions(valid)
            cache = _cache(model, tokens.shape[0], tokens.shape[1] + max_new_tokens)
            first, cache = step(tokens, positions, valid, cache)
        ended = ~active | jnp.isin(first, eos)
        out = jnp.full((tokens.shape[0], max_new_tokens), pad_id, jnp.int32)
        out = out.at[:, 0].set(first)

        def going(state: Any) -> Any:
            i, _, _, ended, _ = state
            return (i < max_new_tokens) & ~jnp.all(ended)

        def extend(state: Any) -> Any:
            i, out, last, ended, cache = state
            position = positions[:, -1:] + i
            token, cache = step(last[:, None], position, ~ended[:, None], cache)
            token = jnp.where(ended, pad_id, token)
            out = jax.lax.dynamic_update_slice(out, token[:, None], (jnp.zeros_like(i), i))
            return i + 1, out, token, ended | jnp.isin(token, eos), cache

        with jax.named_scope("decode"):
            state = (jnp.ones((), jnp.int32), out, first, ended, cache)
            steps, out, _, ended, _ = jax.lax.while_loop(going, extend, state)
        is_end = jnp.isin(out, eos)
        finished = jnp.any(is_end & (jnp.arange(max_new_tokens) < steps), axis=1)
        return out, jnp.where(finished, jnp.argmax(is_end, axis=1), steps), finished

    return jax.jit(run, out_shardings=replicated(static.mesh))


def _step(
    model: Model,
    weights: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    cache: KVCache,
) -> tuple[Int[Array, "B"], KVCache]:
    """Read tokens; return the most likely next one of each row, and the cache."""
    x, new = model.hidden(weights, params, tokens, positions, valid, cache)
    assert new is not None
    logits = model.logits(weights, params, x[:, -1])
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), new


def _cache(model: Model, rows: int, slots: int) -> KVCache:
    """An empty cache, its rows and heads split like the batch and the key/value projections."""
    cache = init_cache(model.config, rows, slots, model.dtype)
    tensor = "tensor" if model.config.num_kv_heads % model.mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(None, ("data", "fsdp"), tensor)
    k, v = jax.lax.with_sharding_constraint((cache.k, cache.v), NamedSharding(model.mesh, spec))
    return cache._replace(k=k, v=v)
