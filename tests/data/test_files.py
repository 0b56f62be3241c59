"""Local files: places of rows, damaged and foreign files, what is never tried on the network."""

import gzip
import json
import os
from pathlib import Path

import pytest

from panacea_jax.data.files import file_rows, local, sha256
from panacea_jax.errors import InputError

ROWS = [{"instruction": "mend\u2028a blorf", "output": f"vix {i}"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def put(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(path: Path) -> list[object]:
    return [row for _, row in file_rows(path)]


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("crlf.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("gaps.jsonl", b"\n" + LINES.replace(b"\n", b"\n \n").rstrip()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("lines.json", LINES),
        ("list.json", json.dumps(ROWS)),
        ("pretty.json.gz", gzip.compress(json.dumps(ROWS, indent=2).encode(), mtime=0)),
        (
            "a.csv",
            "instruction,output\n" + "".join(f"mend\u2028a blorf,vix {i}\n" for i in range(3)),
        ),
        (
            "quoted.csv.gz",
            gzip.compress(
                "\ufeffoutput,instruction\r\n".encode()
                + "".join(f'vix {i},"mend\u2028a blorf"\r\n' for i in range(3)).encode(),
                mtime=0,
            ),
        ),
    ],
)
def test_text_files(tmp_path: Path, name: str, data: bytes | str):
    assert read(put(tmp_path / name, data)) == ROWS


def test_places_count_lines_and_records(tmp_path: Path):
    path = put(tmp_path / "a.jsonl", b"\n" + LINES)
    assert [place for place, _ in file_rows(path)][:2] == [f"{path}:2: record 1", f"{path}:3: record 2"]
    path = put(tmp_path / "a.csv", 'a,b\n"two\nlines",1\nx,2\n')
    assert list(file_rows(path)) == [
        (f"{path}:3: record 1", {"a": "two\nlines", "b": "1"}),
        (f"{path}:4: record 2", {"a": "x", "b": "2"}),
    ]


def test_long_csv_cells(tmp_path: Path):
    path = put(tmp_path / "a.csv", "a\n" + "x" * 200_000 + "\n")
    assert read(path) == [{"a": "x" * 200_000}]


def test_malformed_text(tmp_path: Path):
    refused(put(tmp_path / "a.jsonl", LINES + b'{"a": \n'), "a.jsonl:4: not JSON")
    refused(put(tmp_path / "b.jsonl", LINES[:-10]), "b.jsonl:3: not JSON")
    refused(put(tmp_path / "c.json", '[{"a": 1},\n {"a": 2},\n oops]'), "c.json:3: not JSON")
    refused(put(tmp_path / "d.jsonl", "[" * 100_000), "d.jsonl:1: not JSON")
    refused(
        put(tmp_path / "e.jsonl", b'{"a": "b"}\n{"a": "\xff"}\n'), "e.jsonl:2: not UTF-8", "0xff"
    )
    refused(put(tmp_path / "f.csv", b"a\nb\nc\xe9\n"), "f.csv:3: not UTF-8 (byte 0xe9)")
    refused(put(tmp_path / "g.csv", "a,b\n1,2\n3\n"), "g.csv:3: 1 cells, but 2 columns")
    refused(put(tmp_path / "h.csv", "a,b\n1,2,3\n"), "h.csv:2: 3 cells, but 2 columns")
    refused(put(tmp_path / "i.csv", 'a\n"never closed\n'), "i.csv:2: not CSV")
    refused(put(tmp_path / "j.csv", "a,a\n1,2\n"), "j.csv:1: a column name occurs twice")
    bom = b'\xef\xbb\xbf{"a": "b"}\n\xff\n'
    refused(put(tmp_path / "k.jsonl", bom), "k.jsonl:2: not UTF-8 (byte 0xff)")


@pytest.mark.parametrize("damage", ["foreign", "cut", "flipped"])
def test_damaged_gzip(tmp_path: Path, damage: str):
    data = bytearray(gzip.compress(LINES * 50, mtime=0))
    if damage == "cut":
        del data[-20:]
    elif damage == "flipped":
        data[30] ^= 0xFF
    else:
        data[:] = LINES
    refused(put(tmp_path / "a.jsonl.gz", bytes(data)), "damaged gzip")


def test_parquet(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert list(file_rows(path)) == [(f"{path}: record {i + 1}", row) for i, row in enumerate(ROWS)]
    refused(put(tmp_path / "b.parquet", path.read_bytes()[:-30]), "not a readable parquet file")
    refused(put(tmp_path / "c.parquet", b""), "not a readable parquet file")


def test_saved_folders(tmp_path: Path):
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(a=dataset, b=dataset).save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "one") == ROWS
    assert read(tmp_path / "two" / "b") == ROWS
    refused(tmp_path / "two", "holds 2 splits; name one", f"{tmp_path}/two/a", f"{tmp_path}/two/b")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "not a folder that datasets saved")
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(b"nonsense")
    refused(tmp_path / "one", "not a folder that datasets saved")


@pytest.mark.parametrize("name", ["a.txt", "a.pkl", "a", "a.gz", "a.parquet.gz", "a.jsonl.zip"])
def test_other_kinds_of_file(tmp_path: Path, name: str):
    refused(put(tmp_path / name, LINES), "unknown kind of file; known: .jsonl .json .csv .parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_unreadable_file(tmp_path: Path, name: str):
    # The start of a process's memory fails to read even for root, whom permissions do not stop.
    if not os.path.exists("/proc/self/mem"):
        pytest.skip("needs /proc/self/mem as a file that cannot be read")
    path = tmp_path / name
    path.symlink_to("/proc/self/mem")
    refused(path, "read")
    with pytest.raises(InputError, match="cannot be read"):
        sha256(path)


@pytest.mark.parametrize(
    "where",
    [
        "absent.jsonl",
        "absent",
        "./owner/name",
        "../owner/name",
        "/owner/name",
        "~/owner/name",
        "~nobody-of-this-name/x",
        "owner/name.csv",
        "owner/name.jsonl:train",
        "owner/name/train.parquet",
        "owner/name.jsonl.gz",
        "owner/a/b/c",
        "owner/../name",
        "owner//name",
        "owner/name/",
        "owner\\name",
        "owner /name",
        "here/name",
        "here/name/subset:split",
        "nul\0byte/x",
        "x" * 5000,
    ],
)
def test_paths_that_are_absent_are_not_hub_ids(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match=r"no such file or folder|cannot be read"):
        local(where)


def test_local_paths_win_over_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for where in (
        "owner/name",
        "owner/name:train",
        "owner/name/sub.set:30k_test",
        "a/b:train[:5%]",
    ):
        assert local(where) is None
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert local("owner/name") == Path("owner/name")


def test_one_object_over_several_lines_is_one_record(tmp_path: Path):
    path = put(tmp_path / "a.json", json.dumps({"a": [ROWS[0]]}, indent=4, ensure_ascii=False))
    assert list(file_rows(path)) == [(f"{path}: record 1", {"a": [ROWS[0]]})]
    refused(put(tmp_path / "b.json", '{\n "a": 1,\n oops\n}\n'), "b.json:3: not JSON")
    refused(put(tmp_path / "c.jsonl", '{\n "a": 1\n}\n'), "c.jsonl:1: not JSON")
