"""How likely the end of a text is after its beginning, and whether greedy decoding would have written it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from panacea_jax.data.encode import check_ids
from panacea_jax.evaluate.judges.reading import padded_batches
from panacea_jax.models.bound import Inputs
from panacea_jax.models.model import Model
from panacea_jax.parallel import batch_sharding, replicated
from panacea_jax.parallel.sharding import batch_rows

# Positions of a batch whose logits exist at a time.
TOGETHER = 32


def log_likelihoods(
    model: Model,
    params: Any,
    texts: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    batch_size: int,
) -> list[tuple[float, bool]]:
    """Of each text ``(Σ log p(token | all before it), whether each of them is the most likely one)``, over its tokens from
    ``start`` on.

    Args:
        model: language model.
        params: adapter, complete weights, or None.
        texts: token ids, at least one each.
        starts: place of the first token that counts, at least 1: what stands before it is given. At the end of the text: 0.0, True.
        batch_size: rows read together, rounded up to what the mesh divides.

    Raises:
        InputError: an id that the model has no row of its embedding for.
    """
    check_ids(texts, model.config.vocab_size, "texts")
    parts = batch_rows(model.mesh)
    rows = -(-batch_size // parts) * parts
    run = _program(dataclasses.replace(model, weights=None, folder=None))
    found: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
    longest = max(map(len, texts), default=0)
    for chosen, tokens, valid in padded_batches(texts, rows, longest):
        counted = valid.copy()
        for row, i in enumerate(chosen):
            counted[row, : starts[i]] = False
        batch = jax.device_put((tokens, valid, counted), batch_sharding(model.mesh))
        total, greedy = jax.device_get(run(model.weights, params, *batch))
        for row, i in enumerate(chosen):
            found[i] = float(total[row]), bool(greedy[row])
    return found


@functools.lru_cache(maxsize=4)
def _program(model: Model) -> Callable[..., Any]:
    """For a model without weights and folder; compiled anew for another length only."""

    def run(
        weights: Any,
        params: Any,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        counted: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
        bound = model.bind(weights, params)
        x, _ = bound.hidden(Inputs.of(tokens, valid, right=True))

        def at(place: tuple[Array, Array]) -> tuple[Array, Array]:
            """One position: the log-probability of its next token, and whether that is the most likely."""
            hidden, token = place
            logits = bound.logits(hidden)
            picked = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
            return picked - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == token

        places = (jnp.moveaxis(x[:, :-1], 1, 0), tokens[:, 1:].T)
        logp, best = jax.lax.map(at, places, batch_size=TOGETHER)
        mask = counted[:, 1:].T
        return jnp.where(mask, logp, 0).sum(axis=0), jnp.where(mask, best, True).all(axis=0)

    return jax.jit(run, out_shardings=replicated(model.mesh))
