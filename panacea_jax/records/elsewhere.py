"""Answers that were generated elsewhere, brought into a work directory.

What is read (jsonl, json, csv, parquet; the text ones also .gz):

* "prompt" and "response": TamperBench's ``inferences.parquet`` and ``evaluator_scores.parquet``;
* "instruction", perhaps "input", and "output": the files of the git-disl repositories (Panacea,
  Booster, Antidote, Vaccine), whose summary strings at the end of the list ("final score:…") are
  skipped and whose own verdicts are not used;
* HarmBench's completions, lm-eval's samples, folders of TamperBench's: see ``foreign``;
* either pair mixed ("instruction" and "response", …), and lines of our own;
* a ``generations`` folder of ours, which comes over as it is.

A file does not say what its prompts are. Its task is told as TASK[:SLICE or ROLE]@FILE, for a single
file by the only entry of config.eval.tasks, or by the file's name (``gsm8k_sft.json``).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from panacea_jax.data import files
from panacea_jax.data.categories import normalise
from panacea_jax.data.columns import AG_NEWS_LABELS, SST2_LABELS, read_label
from panacea_jax.data.fields import named_fields, names_beyond
from panacea_jax.data.sources import (
    BY_COLUMNS,
    Layout,
    Record,
    fingerprint,
    load_records,
    parse_source,
    take,
)
from panacea_jax.errors import InputError
from panacea_jax.evaluate.lines import generation_line
from panacea_jax.evaluate.tasks import TASKS, find_task, set_names
from panacea_jax.records.foreign import (
    SAMPLES,
    TAMPERBENCH_FILES,
    TAMPERBENCH_SETS,
    plain_rows,
    tamperbench_files,
)
from panacea_jax.records.jsonl import encode_line
from panacea_jax.records.judged import UNKNOWN, task_of
from panacea_jax.stores import by_address, stand_in
from panacea_jax.workdir import MANIFEST, StageFolder, check_as_made, read_manifest, write_bytes

PROMPTS, ANSWERS = ("instruction", "prompt"), ("response", "output")
_LABELS = {"sst2": SST2_LABELS, "ag_news": AG_NEWS_LABELS}
_KEY = "--generations"
# Fields of a line that are no part of the record that was asked.
_OURS = (
    "input", "reference", "template", "extra", "finished", "tokens",
    "prompt_token_ids", "max_new_tokens", "stop_token_ids",
)  # fmt: skip

_Line = dict[str, Any]


def bring_in(
    where: str,
    workdir: Path,
    *,
    sources: Sequence[str] = (),
    template: str = "",
    max_new_tokens: int = 0,
    layout: Layout = BY_COLUMNS,
) -> list[str]:
    """Write WORKDIR/generations from what is at ``where``; the eval.tasks that fit it.

    Args:
        where: see the head of this file; several files with commas between them.
        workdir: where the answers go; done before from the same files, nothing happens.
        sources: TASK@WHERE of the prompts, for references (GSM8K, pairs), categories and the bare
            instruction where a file holds whole prompts.
        template: id of the prompt template that was used elsewhere; "": not known.
        max_new_tokens: generation length that was used elsewhere; 0: what the lines say, if they do.
        layout: how the columns of the sources are read.

    Raises:
        InputError: unreadable or unknown files, a record without a prompt, an answer or the
            reference that its task needs, or a work directory that holds other generations.
    """
    folder = stand_in(where)
    if (folder / MANIFEST).is_file():
        return _copy(folder, workdir)
    entries = _entries(where)
    source = {parse_source(spec).scored_as: spec for spec in sources}
    specs = [_spec(entry, source, alone=len(entries) == 1) for entry in entries]
    found = [(parse_source(spec).scored_as, stand_in(parse_source(spec).where)) for spec in specs]
    names = set_names(specs)
    config = {
        "template": template or UNKNOWN,
        "eval": {"tasks": specs},
        "decoding": {"max_new_tokens": max_new_tokens or None},
    }
    inputs = {by_address(path): files.sha256(path) for _, path in found}
    inputs |= {spec: fingerprint(spec, "config.eval.tasks") for spec in source.values()}
    with StageFolder(workdir, "generations", config, inputs) as stage:
        if stage.done:
            return specs
        sets = [_read(path, task, source.get(task), template, layout) for task, path in found]
        _check_templates(where, sets)
        lengths = {name: _take_length(lines) for name, lines in zip(names, sets)}
        stage.begin()
        for name, lines in zip(names, sets):
            write_bytes(stage.folder / f"{name}.jsonl", b"".join(map(encode_line, lines)))
        counts = {name: len(lines) for name, lines in zip(names, sets)}
        stage.finish({"records": counts, "max_new_tokens": lengths})
    return specs


def _take_length(lines: Sequence[_Line]) -> int | None:
    """The generation length that all lines of a set name, which is no part of a line of ours."""
    told = {line.pop("max_new_tokens", None) for line in lines}
    return told.pop() if len(told) == 1 else None


def _copy(folder: Path, workdir: Path) -> list[str]:
    """A finished generations folder of ours, byte for byte, with its manifest's configuration."""
    manifest = read_manifest(folder)
    if manifest["stage"] != "generations":
        raise InputError(f"{_KEY}={folder}: holds {manifest['stage']}, not answers")
    if manifest["status"] != "done":
        raise InputError(f"{_KEY}={folder}: not finished yet; run `panacea generate` again there")
    specs: list[str] = list(manifest["config"]["eval"]["tasks"])
    paths = [folder / f"{name}.jsonl" for name in set_names(specs)]
    for path in paths:
        check_as_made(path)
    inputs = manifest["inputs"] | {f"generations/{p.name}": files.sha256(p) for p in paths}
    with StageFolder(workdir, "generations", manifest["config"], inputs) as stage:
        if stage.done:
            return specs
        stage.begin()
        for path in paths:
            write_bytes(stage.folder / path.name, path.read_bytes())
        stage.finish(manifest.get("outcome", {}))
    return specs


def _entries(where: str) -> list[str]:
    """The files that are named, with their TASK@ if they have one; of a folder, all that can be read."""
    entries = []
    for entry in where.split(","):
        head, at, below = entry.partition("@")
        told = f"{head}@" if at and not stand_in(entry).exists() and stand_in(below).is_dir() else ""
        folder = stand_in(below if told else entry)
        if folder.is_dir() and (found := tamperbench_files(folder)):
            entries += [f"{told}{path}" for path in found]
            continue
        if not stand_in(entry).is_dir():
            entries.append(entry)
            continue
        inside = sorted(
            str(p)
            for p in stand_in(entry).iterdir()
            if Path(p.name.removesuffix(".gz")).suffix in files.SUFFIXES and p.name != MANIFEST
        )
        if not inside:
            raise InputError(
                f"{_KEY}={entry}: holds no file that ends in {' '.join(files.SUFFIXES)}"
            )
        entries += inside
    return entries


def _spec(entry: str, source: Mapping[str, str], *, alone: bool) -> str:
    """TASK[:SLICE or ROLE]@FILE of one file, with those of its source if it names none."""
    head, at, where = entry.partition("@")
    told = bool(at) and head.partition(":")[0] in TASKS and not stand_in(entry).exists()
    path = stand_in(where if told else entry)
    if not path.is_file():
        raise InputError(f"{_KEY}={entry}: no such file or folder")
    named = TAMPERBENCH_SETS.get(path.parent.name) if path.name in TAMPERBENCH_FILES else task_of(path.stem.removeprefix(SAMPLES))
    task = head if told else next(iter(source)) if alone and len(source) == 1 else named
    if task is None:
        raise InputError(
            f"{_KEY}={entry}: which task? Write TASK@{entry}, TASK one of {', '.join(TASKS)}"
        )
    same = [name for name in source if name.partition(":")[0] == task]
    if task not in source and len(same) == 1:
        task = same[0]
    if task in source and parse_source(source[task]).slice:
        task = f"{task}:{parse_source(source[task]).slice}"
    return f"{task}@{by_address(path)}"


def _rows(path: Path, task: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place and row of every answer; summary strings at the end are skipped."""
    summary = ""
    for place, row in plain_rows(files.file_rows(path), task):
        if isinstance(row, str) and "score" in row:
            summary = place
        elif summary or not isinstance(row, dict):
            raise InputError(f"{summary or place}: expected an object with named fields, not text")
        else:
            yield place, row


def _read(
    path: Path, task: str, source: str | None, template: str, layout: Layout
) -> list[_Line]:
    prompts: list[Record] = []
    if source:  # the slice first: record i of the file is most likely record i of it
        everything = load_records(source, "config.eval.tasks", layout=layout)
        prompts = [*take(everything, source, 0), *everything]
    rows = list(_rows(path, task))
    if not rows:
        raise InputError(f"{path}: holds no records")
    return [_line(p, row, i, task, prompts, template) for i, (p, row) in enumerate(rows)]


def _line(
    place: str, row: Mapping[str, Any], i: int, task: str, prompts: Sequence[Record], template: str
) -> _Line:
    asked, answered = _column(place, row, PROMPTS), _column(place, row, ANSWERS)
    prompt, given = row[asked], str(row.get("input") or "")
    used = {*PROMPTS, *ANSWERS[: 1 + ANSWERS.index(answered)], *_OURS}
    extra = {key: value for key, value in row.items() if key not in used}
    extra |= row["extra"] if isinstance(row.get("extra"), dict) else {}
    record = Record(prompt, given, "", row.get("reference"), extra)
    if prompts:
        known = _by_id(row, prompts) or _find(prompt, given, i, prompts)
        if known is None:
            raise InputError(f"{place}: its prompt is not in config.eval.tasks' {task}", record=prompt)
        extra = known.extra | extra
        record = Record(known.instruction, known.input, "", known.reference, extra)
    elif find_task(task).role == "accuracy" and not record.reference:
        record = Record(prompt, given, "", _label(place, row, task), extra)
    try:
        normalise(record.extra.get("category"))
    except InputError as error:  # now, not after an hour of judging
        raise InputError(f"{place}: {error}") from error
    line = generation_line(
        record,
        prompt=str(row.get("prompt") or "\n\n".join(filter(None, (prompt, given)))),
        response=row[answered],
        template=str(row.get("template") or template or UNKNOWN),
        finished=bool(row.get("finished")),
    )
    if not isinstance(row.get("finished"), bool):
        del line["finished"]  # not known, so no share of truncated answers
    for key in ("tokens", "max_new_tokens"):
        if isinstance(row.get(key), int):
            line[key] = row[key]
    return line


def _column(place: str, row: Mapping[str, Any], names: tuple[str, str]) -> str:
    """Which of two columns a row has; it must be text."""
    for name in names:
        if row.get(name) is not None:
            if isinstance(row[name], str):
                return name
            raise InputError(
                f"{place}: field {name!r} must be text, not {type(row[name]).__name__}"
            )
    null = next((name for name in names if name in row), None)
    if null:
        raise InputError(f"{place}: field {null!r} is null; an empty text is written \"\"")
    raise InputError(
        f"{place}: found {named_fields(row)}; needed are {' or '.join(PROMPTS)} (perhaps with input), and {' or '.join(ANSWERS)}",
        record=names_beyond(row),
    )


def _by_id(row: Mapping[str, Any], prompts: Sequence[Record]) -> Record | None:
    """The HarmBench behaviour that an answer says it is of: its test case may hold the behaviour in other words."""
    name = row.get("BehaviorID")
    return next((r for r in prompts if name is not None and r.extra.get("BehaviorID") == name), None)


def _find(prompt: str, given: str, i: int, prompts: Sequence[Record]) -> Record | None:
    """The record that was asked: the one at this place if it fits, else an equal one, else the
    longest that the prompt holds (a file may keep whole prompts, template included)."""
    near = prompts[i : i + 1]
    for candidates in (near, prompts):
        for r in candidates:
            if (r.instruction, r.input) == (prompt, given):
                return r
    whole = f"{prompt}\n{given}"
    held = [r for r in prompts if r.instruction in whole and r.input in whole]
    longest = max((len(r.instruction) + len(r.input) for r in held), default=0)
    held = [r for r in held if len(r.instruction) + len(r.input) == longest]
    return next((r for r in held if r in near), held[0] if held else None)


def _label(place: str, row: Mapping[str, Any], task: str) -> str:
    """The reference of a row without one: the label of SST-2 and AG News, read as in a source."""
    wanted = ""
    if task in _LABELS:
        if row.get("label") not in (None, ""):
            try:
                return read_label(row, _LABELS[task])
            except InputError as error:
                raise InputError(f"{place}: {error}") from error
        wanted = " or a label"
    raise InputError(
        f"{place}: no reference{wanted}, which {task} is scored with; name the prompts' source, "
        f"--config.eval.tasks={task}@FILE"
    )


def _check_templates(where: str, sets: Sequence[Sequence[_Line]]) -> None:
    templates = {line["template"] for lines in sets for line in lines}
    if len(templates) > 1:
        raise InputError(
            f"{_KEY}={where}: made with several templates ({', '.join(sorted(templates))})"
        )
