"""What a sweep found: a row a setting, means over seeds where these are an axis, the best, and those that no other beats."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.markup import escape
from rich.table import Table

from panacea_jax.comparison.results import FIGURES, measure_stages, over_seeds
from panacea_jax.comparison.table import ATTACKED, figure_text
from panacea_jax.config.axes import objective
from panacea_jax.defences.protocol import STAGES
from panacea_jax.evaluate.front import undominated
from panacea_jax.evaluate.intervals import bootstrap_mean
from panacea_jax.progress import table_console
from panacea_jax.reporting.outcomes import TITLES
from panacea_jax.spreadsheet import as_csv_text
from panacea_jax.stages.curve import CURVE
from panacea_jax.sweep.plan import FINISHED, Run, status_of
from panacea_jax.terminal import safe_text
from panacea_jax.untrusted import read_object
from panacea_jax.workdir import MANIFEST, read_manifest

_Json = dict[str, Any]
COSTS = ("passes", "step_seconds", "step_bytes")


def outcome_of(config: ConfigDict, folder: Path) -> _Json:
    """What is noted of a finished run.

    Returns:
        "figures": ``{"hs": {"value", "ci95"}, …}`` in percent; "passes": forward + backward, in batches; "step_seconds": of all steps,
        compilation left out, None where that is not known; "step_bytes": of one device, the largest stage's; with ``eval.every`` also
        "curve", the points of curve.json.
    """
    stages: dict[str, Path] = {s: folder / s for s in STAGES if (folder / s / MANIFEST).is_file()}
    if config.heal.methods:  # tried side by side, none of which is this run's cost
        stages.pop("heal", None)
    found = measure_stages(stages, folder, config.judge.name)
    figures = over_seeds({config.seed: found})
    curve = folder / CURVE
    return {
        **({"curve": read_object(curve)["points"]} if curve.is_file() else {}),
        "figures": {name: {"value": f["mean"], "ci95": f["ci95"]} for name, f in figures.items()},
        "passes": sum(found.passes.values()),
        "step_seconds": found.seconds,
        "step_bytes": max(found.step_bytes.values(), default=0),
    }


def rule_of(objectives: Sequence[str]) -> str:
    """How the best is chosen, in words."""
    signed = [f"{'+' if more else '−'} {TITLES[figure]}" for figure, more in map(objective, objectives)]
    return f"the highest {' '.join(sorted(signed)).removeprefix('+ ')}, in points; of equals the first"


def collect(runs: Sequence[Run], folder: Path, objectives: Sequence[str]) -> list[_Json]:
    """The rows of the table.

    Args:
        runs: in their order; those that differ in the seed alone are one row.
        folder: of the runs.
        objectives: that the best is chosen by, see ``config.axes.objective``.

    Returns:
        A row has "setting" (without the seed), "folders" by seed and "status" (that of the run that is furthest from done). When all its
        runs are done also "figures" (``{"hs": {"mean", "ci95", "by_seed"}, …}``), "passes", "step_seconds" and "step_bytes" (of all its
        seeds together, the last the largest), "best", "front" and, with ``eval.every``, "curves" by seed. If one failed, "error".
    """
    groups: dict[tuple[tuple[str, Any], ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(pair for pair in run.setting if pair[0] != "seed"), []).append(run)
    rows = [_row(dict(setting), group, folder) for setting, group in groups.items()]
    ranked = [row for row in rows if all(objective(name)[0] in row.get("figures", {}) for name in objectives)]
    gains = [[_gain(row, name) for name in objectives] for row in ranked]
    best = max(range(len(ranked)), key=lambda i: sum(gains[i]), default=None)
    front = undominated(gains)
    for i, row in enumerate(ranked):
        row["best"], row["front"] = i == best, i in front
    return rows


def _gain(row: _Json, name: str) -> float:
    figure, more = objective(name)
    mean = float(row["figures"][figure]["mean"])
    return mean if more else -mean


def _row(setting: _Json, runs: Sequence[Run], folder: Path) -> _Json:
    folders = {str(run.config.seed): folder / run.name for run in runs}
    states = {str(run.config.seed): status_of(run, folder) for run in runs}
    order = ("failed", "waiting", "running", "done")
    row: _Json = {
        "setting": setting,
        "folders": {seed: str(path.relative_to(folder.parent)) for seed, path in folders.items()},
        "status": min(states.values(), key=order.index),
    }
    told = {seed: read_manifest(folders[seed])["outcome"] for seed in folders if states[seed] in FINISHED}
    if row["status"] == "failed":
        row["error"] = next(outcome["error"] for outcome in told.values() if "error" in outcome)
    if row["status"] == "done":
        row["figures"] = {name: _over_seeds(name, told) for name in next(iter(told.values()))["figures"]}
        for name in COSTS:
            values = [outcome.get(name) for outcome in told.values()]
            total = max if name == "step_bytes" else sum
            row[name] = None if None in values else total(values)
        if curves := {seed: outcome["curve"] for seed, outcome in told.items() if "curve" in outcome}:
            row["curves"] = curves
    return row


def _over_seeds(name: str, told: Mapping[str, _Json]) -> _Json:
    """As in a comparison: with several seeds the bootstrap's interval over them, with one the one over prompts."""
    values = {seed: outcome["figures"][name]["value"] for seed, outcome in told.items()}
    alone = next(iter(told.values()))["figures"][name]["ci95"]
    interval = list(bootstrap_mean(list(values.values()))) if len(values) > 1 else alone
    return {"mean": statistics.fmean(values.values()), "ci95": interval, "by_seed": values}


def rows_as_csv(rows: Sequence[_Json]) -> str:
    """A line a row, numbers unrounded; an empty cell is not known."""
    axes = list(rows[0]["setting"])
    parts = ("mean", "low", "high")
    names = [*FIGURES, *([ATTACKED] if any(ATTACKED in row.get("figures", {}) for row in rows) else [])]
    figures = [f"{name}_{part}" for name in names for part in parts]
    lines = [[*axes, "status", *figures, *COSTS, "best", "front", "folders", "error"]]
    for row in rows:
        found = [row.get("figures", {}).get(name) for name in names]
        numbers = [x for f in found for x in ([f["mean"], *f["ci95"]] if f else [""] * len(parts))]
        costs = [row.get(name) for name in COSTS]
        marks = [row.get("best"), row.get("front"), " ".join(row["folders"].values()), row.get("error")]
        lines.append([*row["setting"].values(), row["status"], *numbers, *costs, *marks])
    return as_csv_text(lines)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_table(rows: Sequence[_Json], objectives: Sequence[str]) -> None:
    """Print the table, best and front marked, and what failed."""
    console = table_console(200)
    table = Table(title="sweep", title_justify="left")
    axes = list(rows[0]["setting"])
    figures = [name for name in (*FIGURES, ATTACKED) if any(name in row.get("figures", {}) for row in rows)]
    for head in ("", *axes, *(TITLES[name] for name in figures), "passes", "step s", "folder"):
        table.add_column(head, overflow="fold")
    for row in rows:
        mark = "best" if row.get("best") else "front" if row.get("front") else "" if "figures" in row else row["status"]
        found = [figure_text(row.get("figures", {}).get(name)) for name in figures]
        costs = [f"{x:.4g}" if (x := row.get(name)) is not None else "–" for name in COSTS[:2]]
        where, *more = row["folders"].values()
        cells = [mark, *map(_text, row["setting"].values()), *found, *costs, f"{where} + {len(more)}" if more else where]
        table.add_row(*map(escape, cells))
    console.print(table)
    names = ", ".join(TITLES[objective(name)[0]] for name in objectives)
    lines = [f"Best: {rule_of(objectives)}. Front: no other row is better in one of {names} and no worse in the rest."]
    lines += [f"Failed: {' '.join(row['folders'].values())}: {row['error']}" for row in rows if "error" in row]
    for line in lines:
        console.print(safe_text(line), markup=False, highlight=False, soft_wrap=True)
