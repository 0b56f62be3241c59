"""Reads the folders that a report is about: a comparison, a sweep, several runs, or one."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from panacea_jax.errors import InputError
from panacea_jax.evaluate.compare import require_comparable
from panacea_jax.reporting.found_comparison import COMPARISON, read_comparison
from panacea_jax.reporting.found_runs import SCORES, is_run, read_runs
from panacea_jax.reporting.found_sweep import SWEEP, read_sweep
from panacea_jax.reporting.outcomes import Found
from panacea_jax.stores import by_address
from panacea_jax.untrusted import parsing, read_object
from panacea_jax.workdir import MANIFEST


def gather(folder: Path, against: Sequence[Path] = ()) -> Found:
    """What there is in a folder, and in those to set beside it.

    Args:
        folder: of a comparison (compare.json), a sweep (sweep.json), or runs: one, or several in folders of their own.
        against: further folders of these kinds; then everything is named after its folder too.

    Raises:
        InputError: a folder that holds nothing to report, or a damaged file.
    """
    sources = [folder, *against]
    if len({path.resolve() for path in sources}) < len(sources):
        raise InputError("--against: a folder cannot stand beside itself")
    found = [_gather_one(path) for path in sources]
    if against:
        names = [path.resolve().name for path in sources]
        names = [by_address(path) if names.count(name) > 1 else name for path, name in zip(sources, names)]
        found = [_named(name, each) for name, each in zip(names, found)]
    scores = {name: path for each in found for name, path in each.scores.items()}
    return Found(
        folder=folder,
        outcomes=[outcome for each in found for outcome in each.outcomes],
        runs=[run for each in found for run in each.runs],
        tried=[outcome for each in found for outcome in each.tried],
        notes=[*dict.fromkeys(note for each in found for note in each.notes), *_unlike(scores)],
        failing=[failure for each in found for failure in each.failing],
        commands=[command for each in found for command in each.commands],
        scores=scores,
    )


def _gather_one(folder: Path) -> Found:
    if (folder / COMPARISON).is_file():
        return read_comparison(folder)
    if (folder / SWEEP).is_file():
        return read_sweep(folder)
    if runs := [folder] if is_run(folder) else [path for path in sorted(folder.glob("*/")) if is_run(path)]:
        return read_runs(folder, runs)
    raise InputError(f"{folder}: nothing to report: no {COMPARISON}, {SWEEP} or {SCORES} and no stage's {MANIFEST}")


def _named(name: str, found: Found) -> Found:
    """Everything of one source under the source's name; a single run is called by it alone."""

    def of(own: str) -> str:
        return name if own == found.folder.resolve().name else f"{name}: {own}"

    return dataclasses.replace(
        found,
        outcomes=[dataclasses.replace(o, method=of(o.method)) for o in found.outcomes],
        tried=[dataclasses.replace(o, method=of(o.method)) for o in found.tried],
        runs=[r._replace(label=of(r.label)) for r in found.runs],
        failing=[(of(where), what) for where, what in found.failing],
        scores={of(own): path for own, path in found.scores.items()},
    )


def _unlike(scores: Mapping[str, Path]) -> list[str]:
    """A line where scores stand side by side that were not measured alike."""
    try:
        if len(scores) > 1:
            with parsing(" and ".join(scores), "not all scores of ours"):
                require_comparable({name: read_object(path, strict=True) for name, path in scores.items()})
    except InputError as error:
        return [f"NOT TO BE COMPARED: {error}"]
    return []
