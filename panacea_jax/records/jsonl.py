"""Generations and judgements on disk: one JSON object a line, append-only, resumable after a kill.

A record counts once its newline is on disk. What a kill can leave behind is one torn last line; it
is dropped on resume, so that the finished file is byte-equal to one from an uninterrupted run. A
file that belongs to other prompts is never touched.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from panacea_jax.errors import InputError
from panacea_jax.stores import publish
from panacea_jax.untrusted import opened, parse_json
from panacea_jax.workdir import lock

Line = dict[str, Any]


def encode_line(record: Mapping[str, Any]) -> bytes:
    """One record as UTF-8 JSON with its newline; text stays readable, keys keep their order."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # a lone surrogate half cannot be UTF-8, but can be escaped
        return json.dumps(record, allow_nan=False).encode("ascii") + b"\n"


def _scan(path: Path) -> tuple[list[Line], bytes]:
    """The whole records, and the torn tail that follows them."""
    with opened(path) as stream:
        data = stream.read()
    lines = data.split(b"\n")
    records: list[Line] = []
    size = 0
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = parse_json(line, f"{path}:{number}", "damaged line")
        except InputError:
            # The last line may be garbage even with its newline (a power cut mid-write); an earlier
            # one may not.
            if number == len(lines) - 1 and not lines[-1]:
                break
            raise
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: expected a JSON object")
        records.append(record)
        size += len(line) + 1
    return records, data[size:]


def read_lines(path: Path) -> list[Line]:
    """Every whole record of the file; a torn last line is left out.

    Raises:
        InputError: the file cannot be read, or a line before the last is damaged.
    """
    return _scan(path)[0]


def _matching(path: Path, prompts: Sequence[str], key: str) -> tuple[int, int]:
    """How many records are done, and the bytes of the torn tail behind them."""
    if not path.exists():
        return 0, 0
    records, tail = _scan(path)
    if len(records) > len(prompts):
        raise InputError(
            f"{path} holds {len(records)} records, more than the {len(prompts)} prompts"
        )
    for number, (record, prompt) in enumerate(zip(records, prompts), start=1):
        if record.get(key) != prompt:
            raise InputError(
                f"{path}:{number}: {key!r} differs from this run's; choose another --workdir"
            )
    if tail and not _is_torn_record(tail, prompts[len(records) :], key):
        raise InputError(f"{path}:{len(records) + 1}: not a record of this run")
    return len(records), len(tail)


def _is_torn_record(tail: bytes, prompts: Sequence[str], key: str) -> bool:
    """Whether the tail may be cut off: a record begun but not ended, or ended but for its newline,
    or blocks never written."""
    text = tail.strip(b"\0\n")
    try:
        record = parse_json(text, "the last line")
    except InputError:
        return not text or text.startswith(b"{")
    return isinstance(record, dict) and bool(prompts) and record.get(key) == prompts[0]


def resume(path: Path, prompts: Sequence[str], key: str = "prompt") -> int:
    """How many leading records are done; reads only.

    Args:
        path: the file, which need not exist (0).
        prompts: what ``key`` must hold in record 0, 1, …: the prompts of a generation file, the
            digests of a judgement file.
        key: the identifying field.

    Raises:
        InputError: the file is damaged or belongs to other prompts.
    """
    return _matching(path, prompts, key)[0]


class Writer:
    """Appends records in order; every ``append`` is on disk when it returns.

    Opening checks the file as ``resume`` does, cuts a torn tail off and leaves everything else as
    it is::

        with Writer(path, prompts) as writer:
            for i in range(writer.done, len(prompts)):
                writer.append({"prompt": prompts[i], "response": …})

    ``put(i, record)`` takes records in any order and writes each run that closes up; only written
    records survive a kill, so a caller that sorts prompts feeds them in chunks of neighbours.

    Attributes:
        done: number of records on disk, hence the index of the next one.
    """

    def __init__(self, path: Path, prompts: Sequence[str], key: str = "prompt") -> None:
        self._path, self._prompts, self._key = path, prompts, key
        self._waiting: dict[int, Mapping[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(path, "ab")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error
        lock(self._file, path)
        try:
            self.done, torn = _matching(path, prompts, key)
        except InputError:
            self._file.close()
            raise
        if torn:
            self._file.truncate(self._file.tell() - torn)
            os.fsync(self._file.fileno())

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write the next records with one flush and fsync.

        Raises:
            ValueError: a record's key is not the one expected at its place.
        """
        expected = self._prompts[self.done : self.done + len(records)]
        if [record.get(self._key) for record in records] != list(expected):
            raise ValueError(f"records {self.done} … do not carry the {self._key!r} expected there")
        self._file.write(b"".join(encode_line(record) for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())
        publish(self._path, growing=True)
        self.done += len(records)

    def put(self, index: int, record: Mapping[str, Any]) -> None:
        """Keep record ``index`` until its turn, then write it and those that waited behind it.

        Raises:
            ValueError: the record is there already.
        """
        if index < self.done or index in self._waiting:
            raise ValueError(f"record {index} is there already")
        self._waiting[index] = record
        ready: list[Mapping[str, Any]] = []
        while self.done + len(ready) in self._waiting:
            ready.append(self._waiting.pop(self.done + len(ready)))
        if ready:
            self.append(*ready)

    def close(self) -> None:
        """Close the file; records that still wait for an earlier one are lost, as after a kill."""
        self._file.close()
        publish(self._path)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
