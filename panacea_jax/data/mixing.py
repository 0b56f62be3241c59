"""How many records of each source, and in which order: mixtures, the poisoned user set (methods.md §14), what is held out."""

import logging
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from panacea_jax.data.order import indices
from panacea_jax.data.sources import Record
from panacea_jax.errors import InputError

_log = logging.getLogger(__name__)
_Row = TypeVar("_Row")


def mixture(sets: Sequence[Sequence[_Row]], weights: Sequence[float]) -> list[_Row]:
    """Records of several sets in fixed proportions, each set in its own order, as many as there are until one set has no more.

    Of the first k records of two sets each set's share is its weight's to within one record; with many sets it may be a little more.
    """
    total, taken = sum(weights), [0] * len(sets)
    mixed: list[_Row] = []
    while True:
        behind = [weight / total * (len(mixed) + 1) - count for weight, count in zip(weights, taken)]
        chosen = behind.index(max(behind))
        if taken[chosen] == len(sets[chosen]):
            return mixed
        mixed.append(sets[chosen][taken[chosen]])
        taken[chosen] += 1


def held_out(records: Sequence[Record], share: float, key: str) -> tuple[list[Record], list[Record]]:
    """Records to train on and records held out, both in order: every (1/share)-th is held out, at least one.

    Raises:
        InputError: nothing is left to train on; ``key`` is that of the share.
    """
    n = max(1, int(share * len(records)))
    if n >= len(records):
        raise InputError(f"{key} = {share}: leaves none of {len(records)} records to train on")
    out = np.zeros(len(records), np.bool_)
    out[((np.arange(n) + 0.5) * len(records) / n).astype(np.int64)] = True
    return [r for r, o in zip(records, out) if not o], [r for r, o in zip(records, out) if o]


def poison(
    benign: Sequence[Record], attack: Sequence[Record], n: int, p: float, off_by_one: bool
) -> tuple[list[Record], list[Record]]:
    """The first int((1−p)·n) benign records, and the first int(p·n) attack records.

    Binary fractions can lose a record: n = 1000 and p = 0.9 gives 99 benign ones. Where there are fewer records, n is lowered until
    there are enough, with a warning: p is what experiments vary.

    Args:
        benign: Records of the user's task.
        attack: Harmful records hidden among them.
        n: Size of the set (config.data.num_examples).
        p: Share of attack records, in [0, 1] (config.data.poison_ratio).
        off_by_one: As the reference code, whose bounds on the attack's index are strict:
            0 < i < int(p·n), one record fewer and not the first.

    Raises:
        InputError: n < 1, p outside [0, 1], or an empty set.
    """
    if n < 1:
        raise InputError(f"config.data.num_examples: must be at least 1, not {n}")
    if not 0 <= p <= 1:  # also false for NaN
        raise InputError(f"config.data.poison_ratio: must be in [0, 1], not {p}")
    asked = n
    while int((1 - p) * n) > len(benign) or int(p * n) > len(attack):
        n -= 1
    if n < asked:
        _log.warning(
            "config.data.num_examples = %d: %d are taken, all there are at config.data.poison_ratio = %g: config.data.user holds "
            "%d records, config.data.attack %d", *(asked, n, p, len(benign), len(attack)),
        )  # fmt: skip
    num_benign, num_attack = int((1 - p) * n), int(p * n)
    parts = list(benign[:num_benign]), list(attack[int(off_by_one) : num_attack])
    if not any(parts):
        raise InputError(f"config.data.num_examples={n} at poison_ratio={p} leaves no record")
    return parts


def first_records(
    records: Sequence[Record], n: int, key: str, count_key: str, off_by_one: bool = False
) -> list[Record]:
    """The first n records of a set, all with a warning if there are fewer; with `off_by_one` the reference's 0 < i < n.

    Args:
        records: In the set's order.
        n: How many are asked for; 0: all.
        key: Configuration key of the source.
        count_key: Configuration key of `n`.
        off_by_one: As the reference code.

    Raises:
        InputError: none is left.
    """
    if len(records) < n:
        _log.warning("%s = %d: %s holds %d records, all are taken", count_key, n, key, len(records))
    n = min(n or len(records), len(records))
    if n <= int(off_by_one):
        raise InputError(f"{key}: {n} records are asked for; at least {1 + off_by_one} are needed")
    return list(records[int(off_by_one) : n])


def realignment(
    refusals: Sequence[Record],
    benign: Sequence[Record],
    n: int,
    ratio: float,
    seed: int,
    shuffle: bool,
) -> list[Record]:
    """n records, refusals and benign ones evenly mixed: of the first k, int(ratio·k) are benign, so any batch has the ratio to within
    one record.

    Each kind comes in its own order (shuffled anew each epoch, or file order) and starts again when it is exhausted. A kind of which
    the ratio takes none may be empty.

    Args:
        refusals: Refusals to harmful prompts (config.data.alignment).
        benign: Benign records (config.data.benign).
        n: Number of records.
        ratio: Share of benign ones, in [0, 1].
        seed: config.seed.
        shuffle: config.data.shuffle.
    """
    is_benign = np.diff((np.arange(n + 1) * ratio).astype(np.int64)) > 0
    chosen = np.empty(n, object)
    for name, where, records in (
        ("benign", is_benign, benign),
        ("alignment", ~is_benign, refusals),
    ):
        if count := int(where.sum()):
            picked = indices(seed, name, 0, count, len(records), shuffle)
            chosen[where] = [records[i] for i in picked]
    return list(chosen)
