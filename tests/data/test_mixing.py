"""Counts of the poisoned set, as published, and their float truncation."""

import itertools
from fractions import Fraction

import pytest

from panacea_jax.data import mixing
from panacea_jax.data.mixing import first_records, held_out, mixture
from panacea_jax.data.sources import Record
from panacea_jax.errors import InputError


def records(name: str, count: int) -> list[Record]:
    return [Record(f"{name}{i}", "", "vix", "", {}) for i in range(count)]


BENIGN, ATTACK = records("b", 1000), records("a", 1000)


def poison(*given, **settings) -> list[Record]:
    """Both parts, one after the other."""
    benign, attack = mixing.poison(*given, **settings)
    return [*benign, *attack]


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


@pytest.mark.parametrize(
    ("benign", "attack", "n"), [(899, 1000, 999), (450, 1000, 501), (1000, 99, 999), (1000, 50, 509), (90, 10, 101)]
)
def test_too_few_of_one_kind_keep_the_ratio(benign: int, attack: int, n: int, caplog):
    mixed = names(poison(BENIGN[:benign], ATTACK[:attack], 1000, 0.1, off_by_one=False))
    assert mixed == names(poison(BENIGN, ATTACK, n, 0.1, off_by_one=False))
    with pytest.raises(AssertionError):  # one more would not do
        assert int(0.9 * (n + 1)) <= benign and int(0.1 * (n + 1)) <= attack
    [warning] = caplog.messages
    assert warning == (
        f"config.data.num_examples = 1000: {n} are taken, all there are at config.data.poison_ratio = 0.1: config.data.user holds {benign} "
        f"records, config.data.attack {attack}"
    )


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


def test_first_of_a_defenders_set(caplog):
    keys = ("config.data.harmful", "config.data.num_harmful")
    assert names(first_records(ATTACK, 3, *keys)) == ["a0", "a1", "a2"]
    assert names(first_records(ATTACK, 3, *keys, off_by_one=True)) == ["a1", "a2"]
    assert first_records(ATTACK, 0, *keys) == ATTACK
    assert first_records(ATTACK, 0, *keys, off_by_one=True) == ATTACK[1:]
    assert not caplog.messages
    assert first_records(ATTACK, 1001, *keys) == ATTACK
    assert caplog.messages == ["config.data.num_harmful = 1001: config.data.harmful holds 1000 records, all are taken"]
    with pytest.raises(InputError, match=r"config\.data\.harmful: .* at least"):
        first_records(ATTACK, 1, *keys, off_by_one=True)


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [((10, 10), (1, 1), (10, 10)), ((30, 10), (2, 1), (20, 10)), ((9, 100), (0.3, 0.7), (9, 21)), ((100, 3, 8), (5, 1, 2), (18, 3, 7))],
)
def test_a_mixture_keeps_its_proportions_all_along(sizes, weights, counts):
    sets = [records(name, size) for name, size in zip("abc", sizes)]
    mixed = names(mixture(sets, [float(weight) for weight in weights]))
    for name, count, weight in zip("abc", counts, weights):
        of_set = [found for found in mixed if found.startswith(name)]
        assert of_set == [f"{name}{i}" for i in range(len(of_set))]
        assert abs(len(of_set) - count) <= 1
        for k in range(1, len(mixed) + 1):
            share = sum(found.startswith(name) for found in mixed[:k])
            assert abs(share - k * weight / sum(weights)) <= 1
    # as many as there are: the set whose turn comes next has no more
    assert any(sum(found.startswith(name) for found in mixed) == size for name, size in zip("abc", sizes))


@pytest.mark.parametrize(("share", "count"), [(0.1, 100), (0.5, 500), (0.0001, 1), (0.999, 999), (0.0015, 1)])
def test_held_out_records_are_spread_evenly(share: float, count: int):
    kept, out = held_out(BENIGN, share, "config.data.validation")
    assert len(out) == count and sorted(names(kept) + names(out)) == sorted(names(BENIGN))
    places = [int(name[1:]) for name in names(out)]
    assert places == sorted(places)
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    with pytest.raises(InputError, match=r"config\.data\.validation = 0\.5: leaves none of 1 records"):
        held_out(BENIGN[:1], 0.5, "config.data.validation")
