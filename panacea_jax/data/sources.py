"""Sources ``TASK@WHERE`` turned into records that are all alike.

TASK says what the columns mean (`columns`), WHERE says where the rows are: a local ``.jsonl``,
``.json``, ``.csv`` (each also ``.gz``) or ``.parquet`` file, a folder written by
``datasets.save_to_disk``, or a hub id ``owner/name[/subset][:split]``. Nothing touches the network
unless WHERE is a hub id and no such local path exists.

Every error line starts with the configuration key and then names file, line or record.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from panacea_jax.data import columns, files, hub
from panacea_jax.errors import InputError


@dataclass(frozen=True)
class Source:
    """A parsed ``TASK@WHERE``."""

    task: str
    where: str


@dataclass(frozen=True)
class Record:
    """One instruction and its answer, whatever the task.

    Attributes:
        instruction: What is asked.
        input: Further context; empty when there is none.
        output: The answer to train on; empty for prompts only.
        reference: What an answer is compared with: the number as text (GSM8K), the label name
            (SST-2, AG News), the output; empty for prompts that have no right answer.
        extra: The columns that were not used, for example `is_safe`; nothing is filtered on load.
    """

    instruction: str
    input: str
    output: str
    reference: Any
    extra: dict[str, Any]


def parse(spec: str) -> Source:
    """Split ``TASK@WHERE`` at its first ``@``; InputError for another form or an unknown TASK."""
    task, at, where = spec.partition("@")
    if not at:
        raise InputError(f"{spec!r} is not a source; write TASK@WHERE, like gsm8k@train.jsonl")
    if task not in columns.READERS:
        raise InputError(f"{spec!r}: unknown task {task!r}; known: {' '.join(columns.READERS)}")
    if not where.strip():
        raise InputError(f"{spec!r}: nothing after the @; give a file, a folder or a hub id")
    return Source(task, where)


def load_records(spec: str, key: str, *, need_output: bool = False) -> list[Record]:
    """Load every record of a source, in its order.

    Args:
        spec: ``TASK@WHERE``.
        key: Configuration key that held `spec`, for error lines.
        need_output: The records are trained on, so prompts alone (say BeaverTails without
            `response`) are refused.

    Raises:
        InputError: Whatever is wrong with the source, in one line.
    """
    try:
        source = parse(spec)
        rows = _rows(source.where)
        records = [_record(source.task, row, place, need_output) for place, row in rows]
        if not records:
            raise InputError(f"{source.where}: holds no records")
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    return records


def by_safety(records: Iterable[Record], safe: bool) -> list[Record]:
    """Keep the records whose `is_safe` equals `safe`, in order; those without that column stay."""
    return [record for record in records if columns.is_safe(record.extra, safe) == safe]


def fingerprint(spec: str, key: str = "source") -> str:
    """Sha256 (hex) of a source's content, for manifests.

    A file's hash is that of its bytes, a folder's is taken over the names and hashes of its files,
    a hub set's over its rows, because its cached files change with the version of `datasets`.
    """
    try:
        where = parse(spec).where
        path = files.local(where)
        return _hash_rows(hub.rows(where)) if path is None else files.sha256(path)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


def _rows(where: str) -> Iterator[tuple[str, Any]]:
    path = files.local(where)
    return hub.rows(where) if path is None else files.rows(path)


def _record(task: str, row: Any, place: str, need_output: bool) -> Record:
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected an object with named fields, not {row!r:.40}")
    try:
        fields = columns.read(task, row, need_output)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    extra = {name: value for name, value in row.items() if name not in fields.used}
    return Record(fields.instruction, fields.input, fields.output, fields.reference, extra)


def _hash_rows(rows: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for _, row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
