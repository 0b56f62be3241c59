"""Hub ids, with `datasets.load_dataset` replaced: no test touches the network."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from panacea_jax.data import hub
from panacea_jax.data.files import undecoded
from panacea_jax.data.sources import fingerprint, load_records
from panacea_jax.errors import InputError

ROWS = [{"instruction": "mend", "output": "vix"}, {"instruction": "mend", "output": "no"}]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """Loads give ROWS, as splits when no split is asked for; what was asked is listed."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, split: str | None) -> Any:
        calls.append((path, name, split))
        if path == "owner/absent":
            raise FileNotFoundError(f"Dataset {path} is not there\nsecond line")
        dataset = datasets.Dataset.from_list(ROWS)
        if split is not None:
            return dataset
        names = {"owner/one": ["test"], "owner/odd": ["a", "b"]}.get(path, ["test", "train"])
        empty = datasets.Dataset.from_dict({"instruction": [], "output": []})
        last = names[-1]
        return datasets.DatasetDict({n: dataset if n == last else empty for n in names})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("owner/name/main", ("owner/name", "main", None)),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name/main:train[:5%]", ("owner/name", "main", "train[:5%]")),
    ],
)
def test_ids(where: str, expected: tuple[Any, ...], asked: list[tuple[Any, ...]]):
    assert hub.split_id(where) == expected
    assert [r.output for r in load_records(f"pairs@{where}", "config.data.user")] == ["vix", "no"]
    assert asked == [expected]


def test_the_only_split_or_train(asked: list[tuple[Any, ...]]):
    assert len(load_records("pairs@owner/one", "k")) == 2
    with pytest.raises(InputError, match="k: owner/odd: choose a split with :SPLIT, one of a, b"):
        load_records("pairs@owner/odd", "k")


def test_errors_are_one_line(asked: list[tuple[Any, ...]]):
    with pytest.raises(InputError, match=r"k: owner/absent: cannot be loaded .*is not there"):
        load_records("pairs@owner/absent", "k")
    with pytest.raises(InputError, match="k: owner/name: record 1: no field 'question'"):
        load_records("gsm8k@owner/name", "k")


def test_local_files_never_ask(asked: list[tuple[Any, ...]]):
    with pytest.raises(InputError, match="no such file"):
        load_records("pairs@owner/name.jsonl", "k")
    assert asked == []


def test_fingerprint_is_of_the_rows(asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch):
    first = fingerprint("pairs@owner/name:train")
    assert len(first) == 64 and first == fingerprint("pairs@owner/other:train")
    monkeypatch.setitem(ROWS[1], "output", "yes")
    assert first != fingerprint("pairs@owner/name:train")


def test_nothing_is_fetched_from_where_a_column_of_pictures_leads(monkeypatch: pytest.MonkeyPatch):
    """Rows, and their hash, are as without such a column but for the path, which nobody follows."""
    gone = {"bytes": None, "path": "/nowhere/wug.png"}
    rows = [row | {"seen": gone, "all": [1, None], "which": 1} for row in ROWS]
    plain = datasets.Features({
        "instruction": datasets.Value("string"), "output": datasets.Value("string"), "all": datasets.Sequence(datasets.Value("int64")),
        "which": datasets.ClassLabel(names=["a", "b"]),
    })  # fmt: skip
    found = datasets.Dataset.from_list(rows, features=datasets.Features(plain | {"seen": datasets.Image()}))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: found)
    assert [row for _, row in hub.hub_rows("owner/name:test")] == rows
    without = found.remove_columns("seen")
    assert list(undecoded(without)) == list(without)
