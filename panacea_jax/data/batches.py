"""Batches of few shapes: rows padded on the right to one of a few bucket lengths.

Every shape is one compilation of the step, and every padded token is computed for nothing; about
eight buckets keep both small. Packing puts several records into one row, which leaves fewer
rows; what a step takes, and what its loss is, stays the same.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt32

from panacea_jax.data.encode import Example
from panacea_jax.data.order import indices
from panacea_jax.data.packing import first_fit
from panacea_jax.data.prefetch import prefetch as prefetch
from panacea_jax.errors import InputError


class Batch(NamedTuple):
    """One step's rows, padded on the right; numpy on the host, jax arrays once put on devices.

    Attributes:
        tokens: Ids; 0 where not valid.
        loss_mask: True on the tokens that are to be predicted (output and EOS), never on a record's
            first.
        valid: True on real tokens; rows of padding are False throughout.
        segments: In packed rows the number of each token's record, 1, 2, … from the left, 0 where
            not valid; None where a row is one record.
        dropout: In a training step with dropout a raw random key for each row, else None.
        entering: What enters the lowest adapted layer, where it was computed before; see `train.entering`.
        numbers: For a method that asks for them, the place in the set of each token's record, from 0;
            0 where not valid.
    """

    tokens: Int32[Any, "B T"]
    loss_mask: Bool[Any, "B T"]
    valid: Bool[Any, "B T"]
    segments: Int32[Any, "B T"] | None = None
    dropout: UInt32[Any, "B _"] | None = None
    entering: Float[Any, "B T D"] | None = None
    numbers: Int32[Any, "B T"] | None = None

    @property
    def records(self) -> Any:
        """How many records it holds, a scalar integer."""
        if self.segments is None:
            return self.valid.any(axis=1).sum()
        return self.segments.max(axis=1).sum()


def length_buckets(max_length: int) -> tuple[int, ...]:
    """The lengths 32, 48, 64, 96, 128, 192, … up to `max_length`, which is always the last.

    Neighbours are at most 1.5 apart, so at most a third of a batch's longest row is padding.
    """
    if max_length < 1:
        raise InputError(f"config.data.max_length: must be at least 1, not {max_length}")
    found = []
    power = 32
    while power < max_length:
        found += [power, power * 3 // 2]
        power *= 2
    return (*(length for length in found if length < max_length), max_length)


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest of `buckets` that holds `length`; InputError if none does."""
    for step in buckets:
        if length <= step:
            return step
    raise InputError(f"{length} tokens do not fit in the longest batch length, {buckets[-1]}")


@dataclass(frozen=True, eq=False)
class Stream:
    """One source of batches, for example "user" or "harmful"; batch t is a pure function of t.

    Attributes:
        name: Enters the order, so that streams are shuffled independently.
        examples: N records in the set's order.
        batch_size: B, records a step.
        seed: config.seed.
        shuffle: False: step t takes records (t·B + j) mod N.
        buckets: Rising lengths that a batch may have.
        fixed_length: Every batch has the bucket that holds the longest record. For auxiliary streams,
            whose lengths would otherwise multiply the shapes of the step.
        row_multiple: Rows without tokens are added up to a multiple of it (data × fsdp devices).
        order: Take records in the order of the stream of this name, which must be as long and have
            as large a batch; "": an order of its own.
        repeats: Batches that a step receives, interleaved into one: see `deinterleave`.
        packing: Steps get their records packed into as few rows as first fit finds.
    """

    name: str
    examples: Sequence[Example]
    batch_size: int
    seed: int
    shuffle: bool
    buckets: tuple[int, ...]
    fixed_length: bool = False
    row_multiple: int = 1
    order: str = ""
    repeats: int = 1
    packing: bool = False

    def __post_init__(self) -> None:
        if not self.examples:
            raise InputError(f"stream {self.name!r}: holds no records")
        if self.batch_size < 1 or self.row_multiple < 1:
            raise InputError(
                f"stream {self.name!r}: batch size {self.batch_size} and row multiple "
                f"{self.row_multiple} must be at least 1"
            )
        if list(self.buckets) != sorted(set(self.buckets)):
            raise InputError(f"stream {self.name!r}: the lengths {self.buckets} must rise")
        bucket(self.longest, self.buckets)

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

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Rows that a packed batch may have: about a quarter, a half, three quarters and all of `rows`."""
        parts, each = self.rows // self.row_multiple, self.row_multiple
        return tuple(sorted({-(-parts * quarters // 4) * each for quarters in range(1, 5)}))

    def first(self, n: int) -> "Stream":
        """The first n records alone, all of them in every batch and in the set's order, a row each; InputError if there are fewer."""
        if len(self.examples) < n:
            raise InputError(f"stream {self.name!r}: holds {len(self.examples)} records, and the first {n} are asked for")
        return replace(self, examples=self.examples[:n], batch_size=n, shuffle=False, order="", packing=False)

    def batch(self, step: int) -> Batch:
        """The batch [rows, T] of a step, as numpy arrays; with `repeats` k, [rows · k, T].

        With `packing` it may have fewer rows, see `row_counts`.
        """
        several = [[self.examples[i] for i in numbers] for numbers in self.numbers(step)]
        if self.packing:
            batches = self._packed(several)
        else:
            length = self._length([example for chosen in several for example in chosen])
            batches = [pad(chosen, length, self.rows) for chosen in several]
        return jax.tree.map(lambda *x: np.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *batches)

    def numbered(self) -> "Stream":
        """Itself, its batches with `Batch.numbers`."""
        return replace(self, examples=[replace(e, number=i) for i, e in enumerate(self.examples)])

    def numbers(self, step: int) -> list[list[int]]:
        """Numbers of the records that a step takes, a list for each of its `repeats` batches."""
        n, name = len(self.examples), self.order or self.name
        return [
            indices(self.seed, name, t, self.batch_size, n, self.shuffle).tolist()
            for t in range(step * self.repeats, (step + 1) * self.repeats)
        ]

    def taken(self, steps: int) -> list[int]:
        """Numbers of the records that so many first steps take, rising."""
        n, count = len(self.examples), steps * self.repeats * self.batch_size
        if count >= n:
            return list(range(n))
        # Batches follow each other in one endless order, so all of them are one great batch.
        return sorted(indices(self.seed, self.order or self.name, 0, count, n, self.shuffle).tolist())

    def once(self) -> Iterator[Batch]:
        """Every record once, in the set's order and a row each; rows without tokens fill up the last batch."""
        for start in range(0, len(self.examples), self.batch_size):
            chosen = self.examples[start : start + self.batch_size]
            yield pad(chosen, self._length(chosen), self.rows)

    def _length(self, chosen: Sequence[Example]) -> int:
        if self.fixed_length:
            return bucket(self.longest, self.buckets)
        return bucket(max(len(example.tokens) for example in chosen), self.buckets)

    def _packed(self, several: Sequence[Sequence[Example]]) -> list[Batch]:
        """Batches of one shape: rows as long as unpacked ones or as the stream's longest, whichever gives fewer tokens."""
        shapes = []
        own = self._length([example for chosen in several for example in chosen])
        for length in {own, bucket(self.longest, self.buckets)}:
            packed = [first_fit([len(e.tokens) for e in chosen], length) for chosen in several]
            rows = bucket(max(map(len, packed)), self.row_counts)
            shapes.append((rows * length, length, rows, packed))
        _, length, rows, packed = min(shapes)
        return [
            pack([[chosen[i] for i in row] for row in found], length, rows)
            for chosen, found in zip(several, packed)
        ]


def deinterleave(batch: Batch, repeats: int) -> Batch:
    """The batches that a stream with `repeats` gave as one, [rows · repeats, T], stacked: [repeats, rows, T].

    Row r of batch k is row r · repeats + k of the whole, so a device that holds an equal share of the whole holds its share of each.
    """
    return jax.tree.map(lambda x: x.reshape(-1, repeats, *x.shape[1:]).swapaxes(0, 1), batch)


def interleave(x: Any) -> Any:
    """Arrays ``[K, rows, …]`` as one ``[rows · K, …]``: the opposite of `deinterleave`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def pad(examples: Sequence[Example], length: int, rows: int) -> Batch:
    """Examples as one batch [rows, length], one a row; InputError if they do not fit."""
    return pack([[example] for example in examples], length, rows)._replace(segments=None)


def pack(groups: Sequence[Sequence[Example]], length: int, rows: int) -> Batch:
    """Groups of examples as one batch [rows, length], one a row, with segments; InputError if they do not fit."""
    if len(groups) > rows:
        raise InputError(f"{len(groups)} examples do not fit in {rows} rows")
    tokens = np.zeros((rows, length), np.int32)
    loss_mask = np.zeros((rows, length), np.bool_)
    segments = np.zeros((rows, length), np.int32)
    known = next((example.entering for group in groups for example in group), None)
    entering = None if known is None else np.zeros((rows, length, known.shape[1]), known.dtype)
    numbered = any(example.number is not None for group in groups for example in group)
    numbers = np.zeros((rows, length), np.int32) if numbered else None
    for row, group in enumerate(groups):
        end = 0
        for number, example in enumerate(group, 1):
            start, end = end, end + len(example.tokens)
            bucket(end, (length,))
            tokens[row, start:end] = example.tokens
            # Nothing comes before a first token: it must not be predicted from another record.
            loss_mask[row, start + 1 : end] = example.loss_mask[1:]
            segments[row, start:end] = number
            if entering is not None:
                entering[row, start:end] = example.entering
            if numbers is not None and example.number is not None:
                numbers[row, start:end] = example.number
    return Batch(tokens, loss_mask, segments > 0, segments, entering=entering, numbers=numbers)
