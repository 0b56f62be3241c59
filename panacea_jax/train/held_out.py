"""The loss on records that are not trained on, and stopping by it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from panacea_jax.data.batches import Stream, length_buckets
from panacea_jax.data.encode import Example
from panacea_jax.defences import Loss
from panacea_jax.models.model import Model
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.train.feeding import WholeSet

_summed = jax.jit(Loss.summed)


def sum_nll(
    model: Model, params: Any, examples: Sequence[Example], batch_size: int, on_batch: Callable[[], object] = lambda: None
) -> tuple[float, int]:  # fmt: skip
    """Negative log-likelihood in nats, summed over all response tokens (EOS included), and their number.

    Args:
        model: base.
        params: adapter, complete weights, or None.
        examples: tokenised as for training.
        batch_size: rows a batch, rounded up to what the mesh divides.
        on_batch: called after each of the ⌈N / batch_size⌉ batches.
    """
    by_length = sorted(examples, key=lambda example: len(example.tokens))  # little padding
    stream = Stream(
        name="held out", examples=by_length, batch_size=batch_size, seed=0, shuffle=False,
        buckets=length_buckets(len(by_length[-1].tokens)), row_multiple=batch_rows(model.mesh),
    )  # fmt: skip
    loss, total, tokens = Loss.of(model), 0.0, 0
    for batch in WholeSet(model, stream):
        found, count = jax.device_get(_summed(loss, params, batch))
        total, tokens = total + float(found), tokens + int(count)
        on_batch()
    return total, tokens


class HeldOut:
    """Looks at the held-out loss now and then, and says when it has stopped falling.

    Attributes:
        stopped: it has.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, every: int, patience: int = 0
    ) -> None:
        """
        Args:
            examples: the records held out.
            batch_size: rows a batch.
            every: steps between two looks.
            patience: looks without a new lowest loss after which to stop; 0: never.
        """
        self._examples, self._batch_size = examples, batch_size
        self._every, self._patience = every, patience
        self._best, self._since = float("inf"), 0
        self.stopped = False

    def due(self, step: int) -> bool:
        """Whether to look after this step."""
        return step % self._every == 0

    def look(self, model: Model, params: Any) -> float:
        """The mean loss, in nats per response token, of w: without ε, as the task loss in training."""
        total, tokens = sum_nll(model, params, self._examples, self._batch_size)
        loss = total / tokens
        self._since = 0 if loss < self._best else self._since + 1
        self._best = min(loss, self._best)
        self.stopped = 0 < self._patience <= self._since
        return loss

    def notes(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        best = self._best if self._best < float("inf") else None
        return {"held_out": {"best": best, "since": self._since, "stopped": self.stopped}}

    def restore(self, notes: Mapping[str, Any]) -> None:
        """Go on from the ``notes`` of the run that was stopped."""
        if found := notes.get("held_out"):
            self._best = float("inf") if found["best"] is None else found["best"]
            self._since, self.stopped = found["since"], found["stopped"]
