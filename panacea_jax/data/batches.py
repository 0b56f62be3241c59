"""Batches of few shapes: rows padded on the right to a rung of a short ladder of lengths.

Every shape is one compilation of the step, and every padded token is computed for nothing; a ladder
of about eight rungs keeps both small.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from panacea_jax.data.encode import Example
from panacea_jax.data.order import indices
from panacea_jax.data.prefetch import prefetch as prefetch
from panacea_jax.errors import InputError


class Batch(NamedTuple):
    """One step's rows, padded on the right; numpy on the host, jax arrays once put on devices.

    Attributes:
        tokens: Ids; 0 where not valid.
        loss_mask: True on the tokens that are to be predicted (output and EOS).
        valid: True on real tokens; rows of padding are False throughout.
    """

    tokens: Int32[Any, "B T"]
    loss_mask: Bool[Any, "B T"]
    valid: Bool[Any, "B T"]


def lengths(max_length: int) -> tuple[int, ...]:
    """The ladder 32, 48, 64, 96, 128, 192, … up to `max_length`, which is always its last rung.

    Neighbours are at most 1.5 apart, so at most a third of a batch's longest row is padding.
    """
    if max_length < 1:
        raise InputError(f"config.data.max_length: must be at least 1, not {max_length}")
    rungs = []
    power = 32
    while power < max_length:
        rungs += [power, power * 3 // 2]
        power *= 2
    return (*(rung for rung in rungs if rung < max_length), max_length)


def rung(length: int, ladder: Sequence[int]) -> int:
    """The smallest rung that holds `length`; InputError if none does."""
    for step in ladder:
        if length <= step:
            return step
    raise InputError(f"{length} tokens do not fit in the longest batch length, {ladder[-1]}")


@dataclass(frozen=True, eq=False)
class Stream:
    """One source of batches, for example "user" or "harmful"; batch t is a pure function of t.

    Attributes:
        name: Enters the order, so that streams are shuffled independently.
        examples: N records in the set's order.
        batch_size: B, records a step.
        seed: config.seed.
        shuffle: False: step t takes records (t·B + j) mod N.
        ladder: Rising lengths that a batch may have.
        fixed_length: Every batch has the rung that holds the longest record. For auxiliary streams,
            whose lengths would otherwise multiply the shapes of the step.
        row_multiple: Rows without tokens are added up to a multiple of it (data × fsdp devices).
        order: Take records in the order of the stream of this name, which must be as long and have
            as large a batch; "": an order of its own.
        repeats: Batches that a step receives, woven into one: see `unweave`.
    """

    name: str
    examples: Sequence[Example]
    batch_size: int
    seed: int
    shuffle: bool
    ladder: tuple[int, ...]
    fixed_length: bool = False
    row_multiple: int = 1
    order: str = ""
    repeats: int = 1

    def __post_init__(self) -> None:
        if not self.examples:
            raise InputError(f"stream {self.name!r}: holds no records")
        if self.batch_size < 1 or self.row_multiple < 1:
            raise InputError(
                f"stream {self.name!r}: batch size {self.batch_size} and row multiple "
                f"{self.row_multiple} must be at least 1"
            )
        if list(self.ladder) != sorted(set(self.ladder)):
            raise InputError(f"stream {self.name!r}: the lengths {self.ladder} must rise")
        rung(self.longest, self.ladder)

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest record."""
        return max(len(example.tokens) for example in self.examples)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that pass over every record at least once: ceil(N / B)."""
        return -(-len(self.examples) // self.batch_size)

    @property
    def rows(self) -> int:
        """Rows of a batch: B rounded up to a multiple of `row_multiple`."""
        return -(-self.batch_size // self.row_multiple) * self.row_multiple

    def batch(self, step: int) -> Batch:
        """The batch [rows, T] of a step, as numpy arrays; with `repeats` k, [rows · k, T]."""
        n, name = len(self.examples), self.order or self.name
        several = [
            indices(self.seed, name, i, self.batch_size, n, self.shuffle).tolist()
            for i in range(step * self.repeats, (step + 1) * self.repeats)
        ]
        length = self._length([i for chosen in several for i in chosen])
        batches = [pad([self.examples[i] for i in c], length, self.rows) for c in several]
        return Batch(*(np.stack(x, axis=1).reshape(-1, length) for x in zip(*batches)))

    def once(self) -> Iterator[Batch]:
        """Every record once, in the set's order; rows without tokens fill up the last batch."""
        for start in range(0, len(self.examples), self.batch_size):
            chosen = range(start, min(start + self.batch_size, len(self.examples)))
            yield pad([self.examples[i] for i in chosen], self._length(list(chosen)), self.rows)

    def _length(self, chosen: list[int]) -> int:
        if self.fixed_length:
            return rung(self.longest, self.ladder)
        return rung(max(len(self.examples[i].tokens) for i in chosen), self.ladder)


def unweave(batch: Batch, repeats: int) -> Batch:
    """The batches that a stream with `repeats` gave as one, [rows · repeats, T], stacked: [repeats, rows, T].

    Row r of batch k is row r · repeats + k of the whole, so a device that holds an equal share of the whole holds its share of each.
    """
    return Batch(*(x.reshape(-1, repeats, x.shape[1]).swapaxes(0, 1) for x in batch))


def pad(examples: Sequence[Example], length: int, rows: int) -> Batch:
    """Examples as one batch [rows, length]; InputError if they do not fit."""
    if len(examples) > rows:
        raise InputError(f"{len(examples)} examples do not fit in {rows} rows")
    tokens = np.zeros((rows, length), np.int32)
    loss_mask = np.zeros((rows, length), np.bool_)
    valid = np.zeros((rows, length), np.bool_)
    for row, example in enumerate(examples):
        n = len(example.tokens)
        rung(n, (length,))
        tokens[row, :n] = example.tokens
        loss_mask[row, example.prompt_length : n] = True
        valid[row, :n] = True
    return Batch(tokens, loss_mask, valid)
