"""What a work directory holds once it has been judged: the sets, and each judge's verdicts."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from panacea_jax.data.slices import ROLES, TASKS_WITH_ROLES
from panacea_jax.data.sources import parse_source
from panacea_jax.errors import InputError
from panacea_jax.evaluate.scores import Json, Judged, ScoredSet
from panacea_jax.evaluate.tasks import TASKS, answer_length, find_task, set_names
from panacea_jax.records.jsonl import Line, read_lines
from panacea_jax.workdir import manifest_if_any

UNKNOWN = "unknown"
# What judging and scoring read of a line of answers: the types of each field, and what they are called.
FIELDS = {
    "prompt": (str, "text"), "response": (str, "text"), "template": (str, "text"),
    "instruction": (str | None, "text"), "input": (str | None, "text"),
    "finished": (bool | None, "true or false"), "tokens": (int | None, "a number"), "extra": (dict | None, "an object"),
}  # fmt: skip


def load_judged(workdir: Path) -> dict[str, Judged]:
    """Every judge of WORKDIR/judgements by its name, in alphabetical order.

    A judge that has not seen some set is loaded with the others.

    Raises:
        InputError: no generations or judgements yet, generations that are not finished, prompts of
            several templates, or a damaged file.
    """
    folder = workdir / "generations"
    tasks = _tasks(folder, check_finished(folder))
    generations = {
        name: read_generations(folder / f"{name}.jsonl", task) for name, task in tasks.items()
    }
    template = one_template(folder, generations.values())
    found: dict[str, list[ScoredSet]] = {}
    for name, task in tasks.items():
        for path in sorted((workdir / "judgements").glob(f"{name}.*.jsonl")):
            judge = path.name.removeprefix(f"{name}.").removesuffix(".jsonl")
            if "." not in judge:  # else a file of the set NAME.something
                judged = ScoredSet(name, task, generations[name], read_lines(path))
                found.setdefault(judge, []).append(judged)
    if not found:
        raise InputError(f"{workdir / 'judgements'}: no verdict yet; run `panacea judge` first")
    decoding = read_decoding(folder)
    return {
        judge: Judged({"name": judge, "version": _version(sets)}, sets, template, decoding)
        for judge, sets in sorted(found.items())
    }


def read_generations(path: Path, task: str) -> list[Line]:
    """The lines of a file of answers to a task, with the fields that judging and scoring read.

    Raises:
        InputError: a field is missing or of another type, or a reference is none that the task's rule can use; names file, line and
            field.
    """
    lines = read_lines(path)
    needed = ["prompt", "response"]
    rule = find_task(task).correct
    if rule:
        needed.append("reference")
    if any("template" in line for line in lines):  # of all or of none
        needed.append("template")
    for number, line in enumerate(lines, start=1):
        for name in needed:
            if line.get(name) is None:
                found = "null" if name in line else "missing"
                raise InputError(f"{path}:{number}: field {name!r} is {found}")
        for name, (kinds, wanted) in FIELDS.items():
            if name in line and not isinstance(line[name], kinds):
                found = "null" if line[name] is None else type(line[name]).__name__
                raise InputError(f"{path}:{number}: field {name!r} must be {wanted}, not {found}")
        if rule:
            try:
                rule("", line["reference"])
            except InputError as error:
                raise InputError(f"{path}:{number}: {error}") from error
    return lines


def check_finished(folder: Path) -> dict[str, Any] | None:
    """The manifest of a generations folder; None where it has none.

    Raises:
        InputError: not a manifest of ours, or answers are still to come.
    """
    manifest = manifest_if_any(folder)
    if manifest and manifest["status"] != "done":
        raise InputError(f"{folder}: not finished yet; run `panacea generate` again to go on")
    return manifest or None


def one_template(folder: Path, sets: Iterable[Sequence[Line]]) -> str:
    """The id of the prompt template of all answers in a generations folder.

    Raises:
        InputError: they have several.
    """
    found = {line.get("template", UNKNOWN) for lines in sets for line in lines} or {UNKNOWN}
    if len(found) > 1:
        raise InputError(f"{folder}: made with several prompt templates ({', '.join(sorted(found))})")
    return str(found.pop())


def read_decoding(folder: Path) -> Json | None:
    """How the answers of a generations folder were decoded; None without a manifest.

    That is what its manifest says, with "max_new_tokens" by set (None: not known), since 0 stands
    for the length of each set's protocol and answers made elsewhere may say their own.

    Raises:
        InputError: not a manifest of ours.
    """
    manifest = manifest_if_any(folder)
    if not manifest:
        return None
    config = manifest["config"]
    specs = config["eval"]["tasks"]
    decoding = config.get("decoding", {"max_new_tokens": config.get("max_new_tokens")})
    length = decoding["max_new_tokens"]
    told = (manifest.get("outcome") or {}).get("max_new_tokens") or {}
    lengths = {
        name: told.get(name) if length is None else length or answer_length(spec)
        for name, spec in zip(set_names(specs), specs)
    }
    return decoding | {"max_new_tokens": lengths}


def task_of(stem: str) -> str | None:
    """The task, perhaps with a role, that a file's name begins with: "agnews_sft" → "ag_news",
    "pairs-harmful" → "pairs:harmful"; None if it is no task's."""
    plain = re.sub("[_-]", "", stem.lower())
    names = [*TASKS, *(f"{task}:{role}" for task in TASKS_WITH_ROLES for role in ROLES)]
    fitting = [name for name in names if plain.startswith(re.sub("[_:]", "", name))]
    return max(fitting, key=len, default=None)


def _tasks(folder: Path, manifest: Mapping[str, Any] | None) -> dict[str, str]:
    """Task by set name; without a manifest, from the file names."""
    if manifest:
        specs = manifest["config"]["eval"]["tasks"]
        return {name: parse_source(spec).scored_as for name, spec in zip(set_names(specs), specs)}
    tasks = {}
    for path in sorted(folder.glob("*.jsonl")):
        task = task_of(path.stem)
        if task is None:
            raise InputError(f"{path}: the name begins with no task ({', '.join(TASKS)})")
        tasks[path.stem] = task
    if not tasks:
        raise InputError(f"{folder}: no generations; run `panacea generate` first")
    return tasks


def _version(sets: Sequence[ScoredSet]) -> str:
    """The version that the first verdict names; ``score`` refuses verdicts of another."""
    versions = (line["version"] for s in sets for line in s.judgements if "version" in line)
    return str(next(versions, UNKNOWN))
