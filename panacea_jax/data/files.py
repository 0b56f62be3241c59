"""Rows of local files and folders, with the place of each row for error lines.

Text is UTF-8 (a byte order mark is skipped). No format here can run code: no pickle, no loading
script. Lines, what gzip unpacks to and the number of records are bounded (docs/untrusted.md).
"""

import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from panacea_jax.errors import InputError
from panacea_jax.stores import stand_in
from panacea_jax.untrusted import MIB, TEXT, opened, parse_json, parsing, reason

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[^/\\]+)?")

# Bytes of a line, which is a record.
LINE = TEXT
# Bytes of a file that is one JSON list or object, which is held whole; JSON lines have no such bound.
LIST = 512 * MIB
# Bytes that gzip may unpack a file to, whatever its size, and beyond that how many times its size; text packs by ten.
UNPACKED, RATIO = 256 * MIB, 200
# Records of a parquet file, whose cells may repeat at no cost, and lines of a text, which may be empty.
RECORDS, LINES = 2**24, 2**25
# HEx-PHI comes as a file a category, category_N.csv without a head, N from 1 on; the second was taken back by its authors.
HEX_PHI = (
    "Illegal Activity", "Child Abuse Content", "Hate/Harass/Violence", "Malware", "Physical Harm", "Economic Harm", "Fraud/Deception",
    "Adult Content", "Political Campaigning", "Privacy Violation Activity", "Tailored Financial Advice",
)  # fmt: skip
# Python's limit of 128 KiB a cell is there for other formats; a pasted document may be longer.
csv.field_size_limit(LINE)


def local(where: str) -> Path | None:
    """The local path that `where` names, or that stands for it in an object store; None for a hub id ``owner/name[/subset][:split]``.

    Raises:
        InputError: Nothing is there and `where` looks like a path, so it is never tried on the
            network. A hub id has one or two slashes, no leading dot, slash or tilde, no file
            suffix, and its owner is not the name of something in the current folder.
    """
    path = stand_in(where)
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
        return _hex_phi(path) if any(path.glob("category_*.csv")) else _saved_folder(path)
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
            with opened(path) as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error


def _lines(path: Path, longest: int = LINE) -> Iterator[tuple[int, str]]:
    """Every line with its number from 1 on, and with its end."""
    with contextlib.ExitStack() as stack, _unpacking(path):
        stream: Any = stack.enter_context(opened(path))
        packed = path.suffix == ".gz"
        most = max(UNPACKED, RATIO * os.path.getsize(path)) if packed else sys.maxsize
        if packed:
            stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
        number = total = 0
        while line := stream.readline(longest + 1):
            number, total = number + 1, total + len(line)
            if len(line) > longest:
                raise InputError(f"{path}:{number}: a line of more than {longest // MIB} MiB")
            if total > most:
                raise InputError(f"{path}: unpacks to more than {RATIO} times its size")
            if number > LINES:
                raise InputError(f"{path}: more than {LINES} lines")
            yield number, _decoded(line, path, number)


@contextlib.contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({reason(error)})") from error


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(f"{path}:{number}: not UTF-8 (byte 0x{byte:02x})") from error


def _json(path: Path, suffix: str) -> Iterator[tuple[str, Any]]:
    """JSON lines; a file named .json may also be one list, which its first character tells, or one object over several lines."""
    number = 0
    lines = _lines(path, LIST if suffix == ".json" else LINE)
    for line, content in lines:
        if not content.strip():
            continue
        if suffix == ".json" and not number and content.lstrip().startswith("["):
            yield from _list(path, line, itertools.chain([content], (text for _, text in lines)))
            return
        if suffix == ".json" and not number and content.strip() == "{":
            whole = _whole(path, itertools.chain([content], (text for _, text in lines)))
            yield f"{path}: record 1", _parse(whole, path, line)
            return
        if len(content) > LINE:
            raise InputError(f"{path}:{line}: a line of more than {LINE // MIB} MiB")
        number += 1
        yield f"{path}:{line}: record {number}", _parse(content.removesuffix("\n"), path, line)


def _list(path: Path, line: int, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(_parse(_whole(path, lines), path, line), start=1):
        yield f"{path}: record {number}", row


def _whole(path: Path, lines: Iterable[str]) -> str:
    text, size = list[str](), 0
    for content in lines:
        text.append(content)
        size += len(content)
        if size > LIST:
            raise InputError(f"{path}: a list of more than {LIST // MIB} MiB; write a record a line (.jsonl)")
    return "".join(text)


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return parse_json(text, f"{path}:{line}")
    except InputError as error:
        if isinstance(cause := error.__cause__, json.JSONDecodeError):
            place = f"{path}:{line + cause.lineno - 1}"
            raise InputError(f"{place}: not JSON ({cause.msg}, column {cause.colno})") from cause
        raise


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    header: list[str] = []
    number = 0
    for line, cells in _cells(path):
        place = f"{path}:{line}"
        if not header:
            header = cells
            if len(set(header)) != len(header):
                raise InputError(f"{place}: a column name occurs twice")
        elif cells:
            number += 1
            if len(cells) != len(header):
                raise InputError(f"{place}: {len(cells)} cells, but {len(header)} columns")
            yield f"{place}: record {number}", dict(zip(header, cells))


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The cells of every line of a CSV file, with the number of the line that they end on."""
    # A line may end in a carriage return alone, which the csv module wants as a line of its own.
    lines = (part for _, line in _lines(path) for part in io.StringIO(line, newline=""))
    reader = csv.reader(lines, strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not CSV ({reason(error)})") from error


def _hex_phi(folder: Path) -> Iterator[tuple[str, Any]]:
    """A prompt a line, with the name of its file's category."""
    number = 0
    for which, harm in enumerate(HEX_PHI, start=1):
        path = folder / f"category_{which}.csv"
        for line, cells in _cells(path) if path.is_file() else ():
            place, number = f"{path}:{line}: record {number + 1}", number + bool(cells)
            if len(cells) > 1:
                raise InputError(f"{place}: {len(cells)} cells; a file of HEx-PHI has one a line, the prompt")
            if cells:
                yield place, {"prompt": cells[0], "category": harm}


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    problem = "not a readable parquet file"
    with parsing(path, problem), opened(path) as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream)
            if file.metadata.num_rows > RECORDS:
                raise InputError(f"{path}: more than {RECORDS} records")
            rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path}: record {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: {problem} ({reason(error)})") from error


def undecoded(found: Any) -> Iterator[Any]:
    """The rows of a set of ``datasets`` as arrow has them: a column declared as pictures or sounds would be fetched from wherever its paths
    lead."""
    return (row for table in found.with_format("arrow").iter(1024) for row in table.to_pylist())


def _saved_folder(path: Path) -> Iterator[tuple[str, Any]]:
    """A folder of ``Dataset.save_to_disk``, or of a ``DatasetDict`` that has one split."""
    import datasets

    if strange := next((file for file in path.rglob("*") if not (file.is_file() or file.is_dir())), None):
        raise InputError(f"{strange}: not a regular file")
    try:
        found = datasets.load_from_disk(str(path))
        if isinstance(found, dict):
            if len(found) != 1:
                names = ", ".join(f"{path}/{split}" for split in found)
                raise InputError(f"{path}: holds {len(found)} splits; name one: {names}")
            found = next(iter(found.values()))
        for number, row in enumerate(undecoded(found), start=1):
            yield f"{path}: record {number}", row
    except InputError:
        raise
    except Exception as error:  # a damaged folder fails in arrow, json or datasets, each its own way
        raise InputError(f"{path}: not a folder that datasets saved ({reason(error)})") from error
