"""The poisoned user set: benign records with a share of attack records (methods.md §14)."""

from collections.abc import Sequence

import numpy as np

from panacea_jax.data.order import indices
from panacea_jax.data.sources import Record
from panacea_jax.errors import InputError


def poison(
    benign: Sequence[Record], attack: Sequence[Record], n: int, p: float, off_by_one: bool
) -> list[Record]:
    """The first int((1−p)·n) benign records, then the first int(p·n) attack records.

    Binary fractions can lose a record: n = 1000 and p = 0.9 gives 99 benign ones.

    Args:
        benign: Records of the user's task.
        attack: Harmful records hidden among them.
        n: Size of the set (config.data.num_examples).
        p: Share of attack records, in [0, 1] (config.data.poison_ratio).
        off_by_one: As the reference code, whose bounds on the attack's index are strict:
            0 < i < int(p·n), one record fewer and not the first.

    Raises:
        InputError: n < 1, p outside [0, 1], too few records, or an empty set.
    """
    if n < 1:
        raise InputError(f"config.data.num_examples: must be at least 1, not {n}")
    if not 0 <= p <= 1:  # also false for NaN
        raise InputError(f"config.data.poison_ratio: must be in [0, 1], not {p}")
    num_benign, num_attack = int((1 - p) * n), int(p * n)
    _enough(benign, num_benign, "config.data.user", n, p)
    _enough(attack, num_attack, "config.data.attack", n, p)
    mixed = [*benign[:num_benign], *attack[int(off_by_one) : num_attack]]
    if not mixed:
        raise InputError(f"config.data.num_examples={n} at poison_ratio={p} leaves no record")
    return mixed


def first_records(records: Sequence[Record], n: int, key: str, off_by_one: bool = False) -> list[Record]:
    """The first n records of a defender's set; with `off_by_one` the reference's 0 < i < n.

    Raises:
        InputError: n asks for none or for more than there are; `key` is the source's key.
    """
    if n <= int(off_by_one):
        raise InputError(f"{key}: {n} records are asked for; at least {1 + off_by_one} are needed")
    if len(records) < n:
        raise InputError(f"{key}: {n} records are asked for, but it holds {len(records)}")
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


def _enough(records: Sequence[Record], wanted: int, key: str, n: int, p: float) -> None:
    if len(records) < wanted:
        raise InputError(
            f"{key}: holds {len(records)} records, but config.data.num_examples={n} at "
            f"config.data.poison_ratio={p} takes {wanted}"
        )
