"""HS, FA and benign requests answered over the epochs of one fine-tuning, of runs whose checkpoints answered too."""

from typing import Any

from panacea_jax.errors import InputError
from panacea_jax.evaluate.scores import Json
from panacea_jax.reporting.charts import line_chart
from panacea_jax.reporting.outcomes import TITLES, Found, figures_of
from panacea_jax.reporting.parts import Chart, Section
from panacea_jax.untrusted import read_object

CURVE = "curve.json"
FIGURES = ("hs", "fa", "benign")


def epochs_section(found: Found) -> Section | None:
    """A picture a figure, a line a run; None where no checkpoints answered."""
    values: dict[str, list[dict[str, Any]]] = {figure: [] for figure in FIGURES}
    for run in found.runs:
        path = run.folder / CURVE
        for point in _points(read_object(path, strict=True), str(path)) if path.is_file() else ():
            figures = figures_of({"sets": {}, **point}, path)
            for figure in (name for name in FIGURES if name in figures):
                mean, low, high = figures[figure]
                place = {"series": run.label, "run": run.name, "x": point["epoch"]}
                values[figure].append({**place, "y": mean, "low": low, "high": high})
    charts = [
        Chart(
            f"epochs_{figure}", f"{TITLES[figure]} (%) over epochs", line_chart(held, "epoch", f"{TITLES[figure]} (%)", True, True),
            f"{TITLES[figure]} over {len({v['x'] for v in held})} points of {len({v['run'] for v in held})} runs",
        )
        for figure, held in values.items()
        if held
    ]  # fmt: skip
    text = ["Checkpoints of one fine-tuning each; 95 % intervals over the prompts. Their points share a model's past: they are no runs."]
    return Section("Over epochs", text, charts) if charts else None


def _points(curve: Json, where: str) -> list[Json]:
    """The points of a curve.

    Raises:
        InputError: it is none.
    """
    try:
        points = list(curve["points"])
        for point in points:
            float(point["epoch"])
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: not a curve of ours ({type(error).__name__})") from error
    return points
