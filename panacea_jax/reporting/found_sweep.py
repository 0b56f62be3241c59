"""What a sweep left: the rows of sweep.json, and the runs behind them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from panacea_jax.defences.spec import Part
from panacea_jax.errors import InputError
from panacea_jax.evaluate.scores import Json
from panacea_jax.reporting.found_runs import READING, stages_of
from panacea_jax.reporting.outcomes import Found, Outcome, Trained, estimated
from panacea_jax.untrusted import read_object

SWEEP = "sweep.json"
_POISON = "data.poison_ratio"
# Keys of these sections are the defender's choice, hence part of a method's name; all others are what it was measured under.
_DEFENCES = {"align": "align.defence.", "finetune": "defence.", "heal": "heal.defence."}


def read_sweep(folder: Path) -> Found:
    """The content of a sweep's folder.

    Raises:
        InputError: sweep.json is damaged, or not one of ours.
    """
    path = folder / SWEEP
    result = read_object(path, strict=True)
    outcomes, runs, failing = [], [], []
    try:
        rows = [(row, _runs_of(row, folder)) for row in result["rows"]]
        common = _names(run for _, several in rows for run in several)  # of rows that have not begun
        for row, several in rows:
            outcome = _of_row(row, common | _names(several))
            runs += [run._replace(label=outcome.label) for run in several]
            if outcome.figures:
                outcomes.append(outcome)
            if row["status"] != "done":
                failing.append((outcome.label, f"{row['status']}: {row.get('error', 'no result yet')}"))
        notes = [f"Judge {result['judge']}. {READING}", f"The sweep's own choice, {result['rule']}: {_best(result['rows'])}."]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: not a sweep of ours ({type(error).__name__}: {error})") from error
    return Found(folder, outcomes, runs, notes=notes, failing=failing)


def _runs_of(row: Json, folder: Path) -> list[Trained]:
    """The runs of a row, one a seed, without a label yet."""
    return [Trained("", int(seed), folder / where, stages_of(folder / where)) for seed, where in row["folders"].items()]


def _names(runs: Iterable[Trained]) -> dict[str, str]:
    """The method of each stage, where a manifest says it."""
    return {
        stage: manifest["config"]["defence"]["name"]
        for run in runs
        for stage, manifest in run.manifests().items()
        if stage in _DEFENCES and manifest["config"].get("defence", {}).get("name")
    }


def _of_row(row: Json, names: Mapping[str, str]) -> Outcome:
    """The outcome of one row; without figures where it has no result."""
    left: dict[str, Any] = dict(row["setting"])
    parts = []
    for stage, prefix in _DEFENCES.items():
        chosen = {key.removeprefix(prefix): left.pop(key) for key in list(left) if key.startswith(prefix)}
        name = chosen.pop("name", names.get(stage, ""))
        if chosen or name not in ("", "sft"):
            parts.append(str(Part(name or stage, tuple(chosen.items()))))
    ratio = left.pop(_POISON, None)
    costs = {
        "passes": _number(row.get("passes")),
        "seconds of steps": _number(row.get("step_seconds")),
        "step MiB": _number(row.get("step_bytes"), 2**20),
    }
    return Outcome(
        "+".join(parts) or "sft",
        {name: estimated(found["mean"], found["ci95"]) for name, found in row.get("figures", {}).items()},
        ratio,
        left,
        list(map(int, row["folders"])),
        costs=costs,
    )


def _number(value: float | int | None, unit: int = 1) -> str:
    return "–" if value is None else f"{value / unit:.0f}"


def _best(rows: list[Json]) -> str:
    best = [row["setting"] for row in rows if row.get("best")]
    return ", ".join(f"{key}={value}" for key, value in best[0].items()) if best else "none"
