"""Curves of training: what the logs of the stages say, step by step."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

from panacea_jax.records.jsonl import Line, read_lines
from panacea_jax.reporting.charts import line_chart
from panacea_jax.reporting.outcomes import Found, Trained
from panacea_jax.reporting.parts import Chart, Section

CURVES = {
    "loss": "loss of the task",
    "validation_loss": "loss on held-out records",
    "harmful_loss": "harmful loss at w",
    "harmful_loss_perturbed": "harmful loss at w + ε",
    "cos_gh": "cos(g, h): do the user's data pull the harmful way?",
    "term_ratio": "λ‖h' − h‖ / ‖g‖: does training notice the perturbation?",
    "epsilon_cosine": "cosine of ε from step to step",
    "displacement": "‖w − w₀‖",
}
"""Metrics that are drawn, in this order, where a log has them."""
POINTS = 200
"""Of a curve; longer ones are thinned evenly, and keep their last."""
LINES = 24
"""Runs in one picture; further ones are left out, and the text says so."""
_STAGES = ("finetune", "heal")


def training_section(found: Found) -> Section | None:
    """A picture a metric: a line for every run whose log has it."""
    logs = [(run, stage, log) for run in found.runs for stage in _STAGES if (log := _log(run, stage))]
    # Cells of a comparison share a stage: its log is one line, not several.
    distinct = {run.stages[stage].resolve(): (run, stage, log) for run, stage, log in reversed(logs)}
    shown = list(reversed(distinct.values()))[:LINES]
    charts = [chart for metric, title in CURVES.items() if (chart := _chart(metric, title, shown))]
    if not charts:
        return None
    text = ["One line a run, from the metrics.jsonl of its stage."]
    if len(distinct) > LINES:
        text.append(f"The first {LINES} of {len(distinct)} runs are drawn.")
    return Section("Training, step by step", text, charts)


def _log(run: Trained, stage: str) -> list[Line]:
    path = run.stages[stage] / "metrics.jsonl" if stage in run.stages else None
    return read_lines(path) if path is not None and path.is_file() else []


def _chart(metric: str, title: str, logs: list[tuple[Trained, str, list[Line]]]) -> Chart | None:
    stages = {stage for _, stage, _ in logs}
    values: list[Mapping[str, Any]] = []
    for run, stage, log in logs:
        more = f", {stage}" if len(stages) > 1 else ""
        values += [
            {"series": run.label + more, "run": run.name + more, "x": step, "y": y} for step, y in _curve(log, metric)
        ]  # fmt: skip
    if not values:
        return None
    runs = len({value["run"] for value in values})
    return Chart(f"curve_{metric}", title, line_chart(values, "step", metric), f"{title}, over the steps of {runs} runs")


def _curve(log: list[Line], metric: str) -> list[tuple[int, float]]:
    """Step and value, thinned; what was not finite is left out."""
    known = [(int(line["step"]), float(line[metric])) for line in log if "step" in line and isinstance(line.get(metric), int | float)]
    finite = [(step, value) for step, value in known if math.isfinite(value)]
    every = math.ceil(len(finite) / POINTS) or 1
    return list(dict.fromkeys(itertools.chain(finite[::every], finite[-1:])))
