"""Counts of the poisoned set, as published, and their float truncation."""

from fractions import Fraction

import pytest

from panacea_jax.data.mixing import first_records, poison
from panacea_jax.data.sources import Record
from panacea_jax.errors import InputError


def records(name: str, count: int) -> list[Record]:
    return [Record(f"{name}{i}", "", "vix", "", {}) for i in range(count)]


BENIGN, ATTACK = records("b", 1000), records("a", 1000)


def names(found: list[Record]) -> list[str]:
    return [record.instruction for record in found]


@pytest.mark.parametrize(
    ("n", "p", "benign", "attack"),
    [
        (1000, 0.1, 900, 100),
        (1000, 0.0, 1000, 0),
        (1000, 1.0, 0, 1000),
        (1000, 0.9, 99, 900),  # 1 − 0.9 is a little below 0.1
        (1000, 0.29, 710, 290),
        (100, 0.29, 71, 28),  # 0.29 · 100 is a little below 29
        (1000, 0.05, 950, 50),
        (1000, 0.5, 500, 500),
        (7, 0.1, 6, 0),
        (15, 0.1, 13, 1),
    ],
)
def test_counts(n: int, p: float, benign: int, attack: int):
    mixed = names(poison(BENIGN, ATTACK, n, p, off_by_one=False))
    assert mixed == [f"b{i}" for i in range(benign)] + [f"a{i}" for i in range(attack)]
    reference = names(poison(BENIGN, ATTACK, n, p, off_by_one=True))
    # 0 < i < p·n: one record fewer, and not the first.
    assert reference == [f"b{i}" for i in range(benign)] + [f"a{i}" for i in range(1, attack)]


def test_the_published_thousand():
    mixed = names(poison(BENIGN, ATTACK, 1000, 0.1, off_by_one=True))
    assert len(mixed) == 999
    assert sum(name.startswith("a") for name in mixed) == 99


def test_truncation_is_that_of_doubles():
    """Where exact arithmetic gives whole numbers, doubles may give one less, never one more."""
    lost = []
    for percent in range(101):
        exact = Fraction(percent, 100) * 1000
        count = len(poison(BENIGN, ATTACK, 1000, percent / 100, off_by_one=False))
        assert count in (999, 1000) and exact.denominator == 1
        if count == 999:
            lost.append(percent)
    assert 90 in lost and not {5, 10, 15, 20, 30, 50, 70} & set(lost)


def test_only_as_many_as_are_taken_are_needed():
    assert names(poison(BENIGN[:1], [], 1, 0.0, off_by_one=False)) == ["b0"]
    assert names(poison([], ATTACK[:2], 2, 1.0, off_by_one=False)) == ["a0", "a1"]


@pytest.mark.parametrize("off_by_one", [False, True])
def test_too_few(off_by_one: bool):
    with pytest.raises(
        InputError, match=r"data\.user: holds 899 records.*=1000 at .*=0\.1 takes 900"
    ):
        poison(BENIGN[:899], ATTACK, 1000, 0.1, off_by_one)
    with pytest.raises(InputError, match=r"data\.attack: holds 99 records.* takes 100"):
        poison(BENIGN, ATTACK[:99], 1000, 0.1, off_by_one)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf")])
def test_impossible_ratio(p: float):
    with pytest.raises(InputError, match=r"config\.data\.poison_ratio: must be in \[0, 1\]"):
        poison(BENIGN, ATTACK, 10, p, off_by_one=False)


@pytest.mark.parametrize("n", [0, -1])
def test_impossible_size(n: int):
    with pytest.raises(InputError, match=r"config\.data\.num_examples: must be at least 1"):
        poison(BENIGN, ATTACK, n, 0.1, off_by_one=False)


def test_nothing_left():
    with pytest.raises(InputError, match="leaves no record"):
        poison(BENIGN, ATTACK, 1, 0.5, off_by_one=False)
    with pytest.raises(InputError, match="leaves no record"):
        poison(BENIGN, ATTACK, 1, 1.0, off_by_one=True)


def test_first_of_a_defenders_set():
    assert names(first_records(ATTACK, 3, "config.data.harmful")) == ["a0", "a1", "a2"]
    assert names(first_records(ATTACK, 3, "config.data.harmful", off_by_one=True)) == ["a1", "a2"]
    for n, off_by_one in ((0, False), (-1, False), (1, True)):
        with pytest.raises(InputError, match=r"config\.data\.harmful: .* at least"):
            first_records(ATTACK, n, "config.data.harmful", off_by_one)
    with pytest.raises(InputError, match=r"harmful: 1001 records are asked for, but it holds 1000"):
        first_records(ATTACK, 1001, "config.data.harmful")
