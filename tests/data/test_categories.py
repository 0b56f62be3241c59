"""BeaverTails' categories: every form that a file may have them in becomes the same list of names."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from panacea_jax.data.categories import CATEGORIES, normalise
from panacea_jax.data.sources import load_records, take
from panacea_jax.errors import InputError

KEY = "config.eval.tasks"
TWO = ["hate_speech,offensive_language", "self_harm"]
BOOLEANS = {name: name in TWO for name in CATEGORIES}


def test_fourteen_names_in_the_published_order() -> None:
    assert len(CATEGORIES) == len(set(CATEGORIES)) == 14
    assert list(CATEGORIES) == sorted(CATEGORIES)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (BOOLEANS, TWO),  # the hub
        (TWO[::-1], TWO),  # the order of the file does not matter
        (tuple(TWO), TWO),
        (json.dumps(BOOLEANS), TWO),  # JSON in a CSV cell
        (str(BOOLEANS), TWO),  # Python in a CSV cell, as pandas writes it
        (json.dumps(TWO), TWO),
        ("self_harm", ["self_harm"]),
        ("hate_speech,offensive_language", TWO[:1]),  # one name, not two
        ("self_harm,hate_speech,offensive_language", TWO),
        ("self_harm; hate_speech,offensive_language", TWO),
        ("Self-harm", ["self_harm"]),
        ("Animal Abuse", ["animal_abuse"]),
        (dict.fromkeys(CATEGORIES, False), []),
        ([], []),
        ("", []),
        (None, []),
        (["self_harm", "self_harm"], ["self_harm"]),
        (["blorf", "self_harm"], ["self_harm", "blorf"]),  # another taxonomy keeps its names
        ("blorf, vix", ["blorf, vix"]),
    ],
)
def test_forms(value: object, expected: list[str]) -> None:
    assert normalise(value) == expected


@pytest.mark.parametrize("value", [3, {"self_harm": "yes"}, ["self_harm", 1], "{'self_harm'", {1}])
def test_other_forms_are_refused(value: object) -> None:
    with pytest.raises(InputError, match="field 'category': .*(text|names)"):
        normalise(value)


def test_the_same_records_from_json_and_csv(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"mend blorf {i}", "category": {**BOOLEANS, "self_harm": i == 0}} for i in (0, 1)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(tmp_path / "a.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "category"])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("a.jsonl", "a.csv"):
        found = [r.extra for r in load_records(f"beavertails@{tmp_path / name}", KEY)]
        assert found == [{"category": TWO}, {"category": TWO[:1]}]


def test_a_bad_category_names_its_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "mend it", "category": 3}) + "\n")
    with pytest.raises(InputError, match=r"a\.jsonl:1: record 1: field 'category': expected names"):
        load_records(f"beavertails@{path}", KEY)


def test_real_prompts(shared: Path) -> None:
    """The counts of the file, taken from its text alone; 425 records have none."""
    import gzip

    path = shared / "beavertails" / "unsafe_prompts.jsonl.gz"
    spec = f"beavertails@{path}"
    found = take(load_records(spec, KEY), spec, 0)
    text = gzip.decompress(path.read_bytes()).decode()
    counts = Counter(name for record in found for name in record.extra["category"])
    assert counts == {name: text.count(f'"{name}"') for name in CATEGORIES if f'"{name}"' in text}
    assert len(counts) == 13 and "child_abuse" not in counts
    assert sum(not record.extra["category"] for record in found) == 425


def test_real_safety_sets_as_they_stand(shared: Path) -> None:
    """AdvBench's goals all count; XSTest keeps what tells safe prompts from unsafe ones."""
    from panacea_jax.evaluate.tasks import counts_for_over_refusal

    goals = f"advbench@{shared}/advbench/harmful_behaviors_goals.jsonl"
    assert len(take(load_records(goals, KEY), goals, 0)) == 520
    safe = f"xstest@{shared}/xstest/prompts.jsonl"
    found = take(load_records(safe, KEY), safe, 0)
    assert len(found) == 450
    assert sum(counts_for_over_refusal({"extra": r.extra}) for r in found) == 250
    assert all(r.extra["type"] and r.extra["label"] in ("safe", "unsafe") for r in found)


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Four records: of one category, of another, of both, and of one with commas in its name."""
    rows = (["self_harm"], ["animal_abuse"], ["animal_abuse", "self_harm"], [CATEGORIES[4]])
    path = tmp_path / "listed.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"mend {i}", "category": c}) + "\n" for i, c in enumerate(rows)))
    return path


@pytest.mark.parametrize(
    ("chosen", "rows"),
    [
        ("only=self_harm", [0, 2]),
        ("not=self_harm", [1, 3]),
        ("only=self_harm+drug_abuse", [0, 2, 3]),
        ("only=drug_abuse,weapons", [3]),
        ("not=animal_abuse+self_harm", [3]),
    ],
)
def test_categories_are_chosen(listed: Path, chosen: str, rows: list[int]) -> None:
    found = load_records(f"beavertails:{chosen}@{listed}", KEY)
    assert [record.instruction for record in found] == [f"mend {i}" for i in rows]


def test_what_only_takes_not_leaves(listed: Path) -> None:
    specs = [f"beavertails:{word}=animal_abuse@{listed}" for word in ("only", "not")]
    found = [record.instruction for spec in specs for record in load_records(spec, KEY)]
    assert sorted(found) == [f"mend {i}" for i in range(4)]


def test_pairs_of_ones_own_have_categories_too(tmp_path: Path) -> None:
    """Of any names; with a role as well."""
    path = tmp_path / "own.jsonl"
    rows = [{"instruction": f"i{i}", "output": "o", "category": c} for i, c in enumerate(("red", "blue"))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for spec in (f"pairs:only=blue@{path}", f"pairs:harmful:not=red@{path}"):
        assert [r.instruction for r in load_records(spec, KEY)] == ["i1"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("only=", "write only=NAME+NAME or not=NAME+NAME"),
        ("only=self_harm+", "write only=NAME+NAME"),
        ("only=drug", "no record of category 'drug'; it has self_harm; animal_abuse; drug_abuse,weapons,banned_substance"),
        ("not=self_harm+animal_abuse+drug_abuse", "leaves no record"),
        ("panacea-1000:only=self_harm", "a slice says by itself which records count"),
        ("every=self_harm", "unknown slice 'every=self_harm'"),
    ],
)
def test_bad_choices(listed: Path, chosen: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_records(f"beavertails:{chosen}@{listed}", KEY)
    assert str(caught.value).startswith(f"{KEY}: ") and message in str(caught.value)


def test_records_without_a_category_are_taken_by_neither(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    rows = [{"prompt": "a", "category": []}, {"prompt": "b", "category": ["self_harm"]}, {"prompt": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [r.instruction for r in load_records(f"beavertails:only=self_harm@{path}", KEY)] == ["b"]
    with pytest.raises(InputError, match="not-self_harm leaves no record"):
        load_records(f"beavertails:not=self_harm@{path}", KEY)
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(InputError, match="no record of category .self_harm.; it has nothing"):
        load_records(f"beavertails:only=self_harm@{path}", KEY)
