"""The guard before every parser, at its bounds."""

import os
import re
from pathlib import Path

import pytest

from panacea_jax.errors import InputError
from panacea_jax.spreadsheet import as_csv_text
from panacea_jax.untrusted import (
    DEPTH,
    match_pattern,
    parse_json,
    parse_yaml,
    parsing,
    read_bounded,
    read_object,
)

PACKAGE = Path(__file__).parents[1] / "panacea_jax"


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def test_json_is_bounded_in_depth():
    assert parse_json(nested(DEPTH), "a.json") is not None
    assert parse_json("[" + "[]," * 1000 + "[]]", "a.json") == [[]] * 1001  # many, but not deep
    for levels in (DEPTH + 1, 900, 100_000):  # of which Python's own parser takes the second, and most walks over it fail
        with pytest.raises(InputError, match=r"^a\.json: not JSON \(nested too deeply\)$"):
            parse_json(nested(levels), "a.json")


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "NaN", "[Infinity]", '{"a": -Infinity}'])
def test_what_only_strict_json_refuses(text):
    parse_json(text, "a.json")
    with pytest.raises(InputError, match=r"^a\.json: not JSON"):
        parse_json(text, "a.json", strict=True)


@pytest.mark.parametrize("text", [b"\xff", b"", b"{", "9" * 5000, b'{"a": \xed\xa0\x80}'])
def test_what_is_no_json(text):
    with pytest.raises(InputError, match=r"^place: broken \(.+\)$"):
        parse_json(text, "place", "broken")


def test_a_file_is_bounded_and_regular(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"[1]")
    assert read_bounded(path, 3) == b"[1]"
    with pytest.raises(InputError, match="has more than"):
        read_bounded(path, 2)
    with pytest.raises(InputError, match="not a JSON object"):
        read_object(path)
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("pipe", "not a regular file"), ("none", "No such file"), (".", "Is a directory")):
        with pytest.raises(InputError, match=f"cannot be read .{why}"):
            read_bounded(tmp_path / name)


STUMBLES = [RecursionError, OverflowError, MemoryError, UnicodeError("x"), KeyError("k"), TypeError, ZeroDivisionError]


@pytest.mark.parametrize("error", STUMBLES)
def test_whatever_a_parser_stumbles_over_is_one_line(error):
    with pytest.raises(InputError, match=r"^file: damaged \(.+\)$"), parsing("file", "damaged"):
        raise error


def test_a_defect_is_none_of_its_content():
    with pytest.raises(NotImplementedError), parsing("file", "damaged"):
        raise NotImplementedError


@pytest.mark.parametrize(
    "text", ["a: &x [1]\nb: *x", "a: 1\na: 2", "!!python/object/apply:os.getcwd []", "[" * 5000, "a: [", "? {a: 1}\n: 2", "\x00"]
)
def test_yaml_of_more_than_plain_values(text):
    with pytest.raises(InputError, match=r"^a\.yaml: not YAML \(.+\)$"):
        parse_yaml(text.encode(), "a.yaml")


def test_plain_yaml():
    assert parse_yaml(b"a: {b: [1, x, 2.5, null, true]}", "a.yaml") == {"a": {"b": [1, "x", 2.5, None, True]}}


def test_an_expression_that_takes_years():
    assert match_pattern(r"(a+)b", "aab", "file")[1] == "aa"
    with pytest.raises(InputError, match=r"^file: the expression '\(a\|a\)\+\$' takes too long to match$"):
        match_pattern(r"(a|a)+$", "a" * 60 + "b", "file")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "=cmd|' /C calc'!A0"])
def test_no_cell_is_a_formula(text):
    [_, line] = as_csv_text([["name", "number"], [text, -1.5]]).split("\n", 1)
    assert line.replace('"', "") == f"'{text},-1.5\n"


def test_cells_stay_what_they_are():
    assert as_csv_text([["a", None, 1e-3, True, "x\0y", "\ud800"]]) == "a,,0.001,True,x\\x00y,\\ud800\n"
    assert as_csv_text([["a", 1]], quote_all=True) == '"a","1"\n'


def files_with(pattern: str) -> set[str]:
    return {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if re.search(pattern, p.read_text("utf-8"))}


def test_no_table_is_written_but_by_that_writer():
    assert files_with(r"csv\.(Dict)?[wW]riter") == {"spreadsheet.py"}


def test_no_json_is_parsed_but_behind_the_guard():
    """What reads JSON by itself reads what it wrote in the same run, or a cell of which every error is caught."""
    ours = (
        "comparison/", "data/categories.py", "parallel/", "reporting/commands.py", "stages/heal.py", "stages/quickstart.py",
        "stages/summary.py", "stages/curve.py", "stages/trust.py", "sweep/results.py", "train/checkpoints.py",
        "train/metrics.py", "worlds/miniature.py", "untrusted.py",
    )  # fmt: skip
    assert not {name for name in files_with(r"json\.loads?\(") if not name.startswith(ours)}
