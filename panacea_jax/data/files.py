"""Rows of local files and folders, with the place of each row for error lines.

Text is UTF-8 (a byte order mark is skipped). No format here can run code: no pickle, no loading
script.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panacea_jax.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[^/\\]+)?")

# Python's limit of 128 KiB a cell is there for other formats; a pasted document may be longer.
csv.field_size_limit(2**30)


def local(where: str) -> Path | None:
    """The local path that `where` names, or None for a hub id ``owner/name[/subset][:split]``.

    Raises:
        InputError: Nothing is there and `where` looks like a path, so it is never tried on the
            network. A hub id has one or two slashes, no leading dot, slash or tilde, no file
            suffix, and its owner is not the name of something in the current folder.
    """
    path = Path(where)
    try:
        path = path.expanduser()
        if path.exists():
            return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, null byte, closed folder, ~who
        raise InputError(f"{where}: cannot be read ({reason(error)})") from error
    suffixes = (*SUFFIXES, ".gz")
    if not _HUB_ID.fullmatch(where) or where.partition(":")[0].endswith(suffixes):
        raise InputError(f"{where}: no such file or folder")
    owner = where.split("/")[0]
    if Path(owner).exists():
        raise InputError(
            f"{where}: no such file or folder (nor taken for a hub id: {owner} is here)"
        )
    return None


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) for every row, in order; place is "FILE:LINE: record N" or without LINE.

    Raises:
        InputError: Unknown kind of file, unreadable, damaged, not UTF-8, malformed.
    """
    if path.is_dir():
        return _saved_folder(path)
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix in (".jsonl", ".json"):
        return _json(path, suffix)
    if suffix == ".csv":
        return _csv(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    known = " ".join(SUFFIXES)
    raise InputError(f"{path}: unknown kind of file; known: {known} (the text ones also with .gz)")


def sha256(path: Path) -> str:
    """Hash (hex) of a file's bytes, or of a folder's file names and their hashes."""
    try:
        if not path.is_dir():
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """The first line of an error, without the path that OSError repeats."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text.strip().split("\n")[0][:200] or type(error).__name__


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({reason(error)})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # A skipped byte order mark is not counted in error.start, but it holds no line end either.
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise InputError(f"{path}:{line}: not UTF-8 (byte 0x{byte:02x})") from error


def _json(path: Path, suffix: str) -> Iterator[tuple[str, Any]]:
    """JSON lines; a file named .json may also be one list, which its first character tells."""
    text = _text(path)
    if suffix == ".json" and text.lstrip().startswith("["):
        for number, row in enumerate(_parse(text, path, 1), start=1):
            yield f"{path}: record {number}", row
        return
    number = 0
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            number += 1
            yield f"{path}:{line}: record {number}", _parse(content, path, line)


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise InputError(f"{place}: not JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise InputError(f"{path}:{line}: not JSON ({reason(error)})") from error


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    header: list[str] = []
    number = 0
    try:
        for cells in reader:
            place = f"{path}:{reader.line_num}"
            if not header:
                header = cells
                if len(set(header)) != len(header):
                    raise InputError(f"{place}: a column name occurs twice")
            elif cells:
                number += 1
                if len(cells) != len(header):
                    raise InputError(f"{place}: {len(cells)} cells, but {len(header)} columns")
                yield f"{place}: record {number}", dict(zip(header, cells))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not CSV ({reason(error)})") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable parquet file ({reason(error)})") from error
    for number, row in enumerate(found, start=1):
        yield f"{path}: record {number}", row


def _saved_folder(path: Path) -> Iterator[tuple[str, Any]]:
    """A folder of ``Dataset.save_to_disk``, or of a ``DatasetDict`` that has one split."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (
        Exception
    ) as error:  # a damaged folder fails in arrow, json or datasets, each its own way
        raise InputError(f"{path}: not a folder that datasets saved ({reason(error)})") from error
    if isinstance(found, dict):
        if len(found) != 1:
            names = ", ".join(f"{path}/{split}" for split in found)
            raise InputError(f"{path}: holds {len(found)} splits; name one: {names}")
        found = next(iter(found.values()))
    for number, row in enumerate(found, start=1):
        yield f"{path}: record {number}", row
