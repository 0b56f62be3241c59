"""Sources ``TASK[:SLICE or ROLE][:attacked][:only=… or :not=…]@WHERE``, and mixtures of them, turned into records that are all alike.

TASK says what the columns mean (`columns`), SLICE which records of a test set count, ROLE what
records of one's own are to be scored as, attacked how prompts are asked (`slices`), only= and not= which categories are taken
(`categories.Selection`), WHERE where the rows are: a local ``.jsonl``, ``.json``, ``.csv`` (each also ``.gz``) or
``.parquet`` file, a folder written by ``datasets.save_to_disk``, or a hub id
``owner/name[/subset][:split]``. Nothing touches the network unless WHERE is a hub id and no such
local path exists.

A mixture to train on is ``SOURCE + SOURCE``, one after the other, or ``SOURCE*2 + SOURCE*1``, in these
proportions.

Every error line starts with the configuration key and then names file, line or record.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from panacea_jax.data import columns, files, hub
from panacea_jax.data.categories import Selection, normalise
from panacea_jax.data.chat import LAYOUTS, Turn
from panacea_jax.data.slices import ATTACKED, find_slice, is_role
from panacea_jax.errors import InputError

_log = logging.getLogger(__name__)

_CHOSEN = re.compile(r"([^=]*):((?:only|not)=.*)")
_WEIGHT = re.compile(r"(.*)\*\s*(\d+\.?\d*|\.\d+)\s*")


@dataclass(frozen=True)
class Source:
    """A parsed ``TASK[:SLICE or ROLE]@WHERE``.

    Attributes:
        task: What the columns mean, a key of `columns.READERS`.
        where: File, folder or hub id.
        slice: A name of `slices.SLICES`, or empty.
        role: One of `slices.ROLES`, or empty.
        categories: Which are taken; None: all.
        attacked: The prompts are asked as the attacker of config.attack does.
    """

    task: str
    where: str
    slice: str = ""
    role: str = ""
    categories: Selection | None = None
    attacked: bool = False

    @property
    def scored_as(self) -> str:
        """The task as scoring knows it: with its role, if it has one, as in "pairs:harmful", and ":attacked"."""
        return (f"{self.task}:{self.role}" if self.role else self.task) + ATTACKED * self.attacked

    @property
    def prompts_only(self) -> bool:
        """Whether the role needs no answers in the records."""
        return self.role in ("harmful", "benign")


@dataclass(frozen=True)
class Record:
    """One instruction and its answer, whatever the task.

    Attributes:
        instruction: What is asked.
        input: Further context; empty when there is none.
        output: The answer to train on; empty for prompts only.
        reference: What an answer is compared with: the number as text (GSM8K), the label name
            (SST-2, AG News), the output; empty for prompts that have no right answer.
        extra: The columns that were not used, for example `is_safe`, and BeaverTails' `category` as
            a list of names; nothing is filtered on load.
        turns: Of a conversation, all turns before the answer; `instruction` is the user's last one. Empty
            where there is no other.
    """

    instruction: str
    input: str
    output: str
    reference: Any
    extra: dict[str, Any]
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Layout:
    """How the rows of a user's own files are to be read.

    Attributes:
        format: Of conversations, a name of `chat.LAYOUTS`; "": told by the columns.
        columns: Our name of a column by the file's; files without such a column are read as they are.
    """

    format: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)


BY_COLUMNS = Layout()


def layout_of(data: Any) -> Layout:
    """What a section ``config.data`` says of it.

    Raises:
        InputError: an unknown format, or an entry that is not OURS=THEIRS.
    """
    if data.format and data.format not in LAYOUTS:
        raise InputError(f"config.data.format: unknown {data.format!r}; known: {', '.join(LAYOUTS)}")
    named: dict[str, str] = {}
    for entry in data.columns:
        ours, equals, theirs = str(entry).partition("=")
        if not (ours and equals and theirs) or theirs in named or ours in named.values():
            raise InputError(f"config.data.columns: {entry!r}: write each column once, as OURS=THEIRS, like output=answer")
        named[theirs] = ours
    return Layout(data.format, named)


def parse_source(spec: str) -> Source:
    """Split ``TASK[:SLICE or ROLE][:attacked][:only=… or :not=…]@WHERE`` at its first ``@``.

    Raises:
        InputError: Another form, an unknown TASK, or a SLICE or ROLE that the task does not have.
    """
    head, at, where = spec.partition("@")
    if not at:
        raise InputError(f"{spec!r} is not a source; write TASK@WHERE, like gsm8k@train.jsonl")
    chosen = _CHOSEN.fullmatch(head)
    named = chosen[1] if chosen else head
    attacked = named.endswith(ATTACKED)
    task, colon, name = named.removesuffix(ATTACKED).partition(":")
    if task not in columns.READERS:
        raise InputError(f"{spec!r}: unknown task {task!r}; known: {' '.join(columns.READERS)}")
    if colon and not name:
        raise InputError(f"{spec!r}: nothing between : and @; name a slice or leave the : out")
    role = name if is_role(task, name) else ""
    name = "" if role else name
    try:
        if find_slice(task, name) and chosen:
            raise InputError("a slice says by itself which records count")
        categories = Selection.parse(chosen[2]) if chosen else None
    except InputError as error:
        raise InputError(f"{spec!r}: {error}") from error
    if not where.strip():
        raise InputError(f"{spec!r}: nothing after the @; give a file, a folder or a hub id")
    return Source(task, where, name, role, categories, attacked)


def parse_mixture(spec: str) -> list[tuple[str, float | None]]:
    """The sources of ``SOURCE[*WEIGHT] + …``, each with its weight; one source alone is a mixture too.

    Raises:
        InputError: weights on some sources only, or one that is 0.
    """
    parts: list[tuple[str, float | None]] = []
    for part in spec.split(" + "):
        weighted = _WEIGHT.fullmatch(part.strip())
        parts.append((weighted[1].strip(), float(weighted[2])) if weighted else (part.strip(), None))
    weights = [weight for _, weight in parts]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        raise InputError(f"{spec!r}: give each source a weight, or none")
    if 0 in weights:
        raise InputError(f"{spec!r}: a weight of 0 takes nothing; leave that source out")
    return parts


def load_records(
    spec: str, key: str, *, need_output: bool = False, prompts: bool = False, layout: Layout = BY_COLUMNS
) -> list[Record]:
    """Load every record of a source, in its order; a slice is not cut out yet (`take`).

    Args:
        spec: ``TASK[:SLICE or ROLE][:only=… or :not=…]@WHERE``.
        key: Configuration key that held `spec`, for error lines.
        need_output: The records are trained on, so prompts alone (say BeaverTails without
            `response`) are refused, and slices and roles, which are of test sets.
        prompts: The prompts alone count, so a record needs no answer; slices and roles are refused likewise.
        layout: How the columns of users' own files are read.

    Raises:
        InputError: Whatever is wrong with the source, in one line.
    """
    try:
        source = parse_source(spec)
        if (source.slice or source.role or source.attacked) and (need_output or prompts):
            what = "slices of test sets" if source.slice else "roles" if source.role else "prompts as the attacker asks them"
            raise InputError(f"{spec!r}: {what} are for config.eval.tasks only")
        rows = _rows(source.where)
        if source.prompts_only or prompts:
            rows = ((place, _with_output(row)) for place, row in rows)
        records = [_record(source.task, row, place, need_output, layout) for place, row in rows]
        if not records:
            raise InputError(f"{source.where}: holds no records")
        if source.categories:
            found = [normalise(record.extra.get("category")) for record in records]
            taken = source.categories.of(found, source.where)
            records = [record for record, take in zip(records, taken) if take]
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    return records


def by_safety(records: Iterable[Record], safe: bool) -> list[Record]:
    """Keep the records whose `is_safe` equals `safe`, in order; those without that column stay."""
    return [record for record in records if columns.is_safe(record.extra, safe) == safe]


def take(records: Sequence[Record], spec: str, num_examples: int) -> list[Record]:
    """The records to evaluate of those that `spec` loads, in file order.

    With a slice, those that it names, and a warning if there are fewer; without one, the first
    `num_examples` (0: all), of BeaverTails those not marked safe.
    """
    source = parse_source(spec)
    named = find_slice(source.task, source.slice)
    if source.task == "beavertails" if named is None else named.unsafe_only:
        records = by_safety(records, safe=False)
    if named is None:
        return list(records[:num_examples] if num_examples else records)
    if named.counts is not None:
        records = [record for record in records if named.counts(record.extra)]
    taken = list(records[named.start : named.start + named.count] if named.count else records[named.start :])
    if 0 < len(taken) < named.count:
        _log.warning("%s: the slice is of %d records, here are %d", spec, named.count, len(taken))
    return taken


def fingerprint(spec: str, key: str = "source") -> str:
    """Sha256 (hex) of a source's content, for manifests.

    A file's hash is that of its bytes, a folder's is taken over the names and hashes of its files,
    a hub set's over its rows, because its cached files change with the version of `datasets`.
    """
    try:
        found = [_fingerprint(parse_source(part).where) for part, _ in parse_mixture(spec)]
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()


def _fingerprint(where: str) -> str:
    path = files.local(where)
    return _hash_rows(hub.hub_rows(where)) if path is None else files.sha256(path)


def _rows(where: str) -> Iterator[tuple[str, Any]]:
    path = files.local(where)
    return hub.hub_rows(where) if path is None else files.file_rows(path)


def _with_output(row: Any) -> Any:
    """The row with an empty answer where it has none."""
    without = isinstance(row, dict) and row.get("output") is None
    return row | {"output": ""} if without else row


def _record(task: str, row: Any, place: str, need_output: bool, layout: Layout) -> Record:
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected an object with named fields, not {type(row).__name__}", record=row)
    if not layout.columns.keys().isdisjoint(row):
        ours = {name for theirs, name in layout.columns.items() if theirs in row}
        row = {layout.columns.get(n, n): value for n, value in row.items() if n not in ours}
    try:
        fields = columns.read_columns(task, row, need_output, layout.format)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    extra = {name: value for name, value in row.items() if name not in fields.used}
    extra.update(fields.normalised)
    return Record(fields.instruction, fields.input, fields.output, fields.reference, extra, fields.turns)


def _hash_rows(rows: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for _, row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
