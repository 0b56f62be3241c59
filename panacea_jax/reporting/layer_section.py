"""Where the perturbation sits: layer safety coefficients of one run, or of several beside each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from panacea_jax.analysis.layer_comparison import (
    FIGURES,
    LayerRun,
    compare_runs,
    relative_depth,
    relative_figure,
    told_apart,
)
from panacea_jax.analysis.layers import Coefficients, layer_coefficients
from panacea_jax.export import load_epsilon
from panacea_jax.reporting.charts import bar_chart, line_chart
from panacea_jax.reporting.outcomes import Found, Trained
from panacea_jax.reporting.parts import Chart, Section, Table
from panacea_jax.untrusted import parsing, read_json_value

KINDS = {"last": "ε of the last step", "mean": "running mean of ε"}
LINES = 24
MODELS = 6
"""So many that every two of them are correlated; of more the pairs would be a page of their own."""


def layers_section(found: Found) -> Section | None:
    """Shares of ‖ε‖² by layer: stacked by module for one run; for several, lines over relative depth."""
    held = [(run, kinds) for run in found.runs if (kinds := _coefficients(run))]
    # Cells of a comparison share a stage and its ε.
    distinct = list({run.stages.get("finetune", run.folder).resolve(): (run, kinds) for run, kinds in reversed(held)}.values())[::-1]
    if not distinct:
        return None
    tables: list[Table] = []
    if len(distinct) == 1:
        charts = [_modules(kind, rows) for kind, rows in distinct[0][1].items()]
        text = [f"Each layer's share of ‖ε‖² in {distinct[0][0].label}, by module."]
    else:
        charts = [chart for kind in KINDS if (chart := _depths(kind, distinct[:LINES]))]
        text = [
            "Each layer's share of ‖ε‖² in units of the mean over its layers (1 everywhere: spread evenly), over l / (L − 1), so that "
            "models of unlike depth compare."
        ]
        text += [f"The first {LINES} of {len(distinct)} runs are drawn."] if len(distinct) > LINES else []
        tables = [table for kind in KINDS if (table := _agreement(kind, distinct))]
    return Section("Layers", text, charts, tables)


def _coefficients(run: Trained) -> dict[str, Coefficients]:
    """By the kind of their ε, from layers.json or else from the exported ε."""
    path = run.folder / "layers.json"
    if path.is_file():
        content = read_json_value(path, strict=True)
        with parsing(path, "not coefficients of ours"):
            found = {str(each["epsilon"]): each for each in (content if isinstance(content, list) else [content])}
            for each in found.values():
                _check(each["layers"])
        return found
    stage = run.stages.get("finetune", run.folder)
    files = {"last": stage / "epsilon.safetensors", "mean": stage / "epsilon_mean.safetensors"}
    return {kind: layer_coefficients(load_epsilon(file), kind=kind) for kind, file in files.items() if file.is_file()}


def _check(rows: Sequence[Mapping[str, Any]]) -> None:
    """Look at all that is drawn of a layers.json.

    Raises:
        LookupError, TypeError, AttributeError, ValueError: something of it is not there, or no number.
    """
    rows[0]
    for row in rows:
        int(row["layer"])
        for held in row["modules"].values():
            float(held["share"])
        for figure in FIGURES:
            if figure == "share" or row[figure] is not None:
                float(row[figure])


def _modules(kind: str, result: Coefficients) -> Chart:
    values = [
        {"x": row["layer"], "y": 100 * held["share"], "series": name.removesuffix("_proj")}
        for row in result["layers"]
        for name, held in row["modules"].items()
    ]  # fmt: skip
    title = KINDS.get(kind, kind)
    return Chart(f"layers_{kind}", title, bar_chart(values, "layer", "share of ‖ε‖² (%)"), f"{title}: share of each layer, by module")


def _depths(kind: str, runs: Sequence[tuple[Trained, Mapping[str, Coefficients]]]) -> Chart | None:
    values: list[dict[str, Any]] = []
    for run, kinds in runs:
        if kind in kinds:
            rows = kinds[kind]["layers"]
            values += [
                {"series": run.label, "run": run.name, "x": depth, "y": float(share)}
                for depth, share in zip(relative_depth(rows), relative_figure(rows, "share"))
            ]  # fmt: skip
    if not values:
        return None
    spec = line_chart(values, "relative depth", "share over its mean", points=True)
    return Chart(f"layers_{kind}", KINDS[kind], spec, f"{KINDS[kind]}: shares of the layers of {len(runs)} runs")


def _agreement(kind: str, held: Sequence[tuple[Trained, Mapping[str, Coefficients]]]) -> Table | None:
    """How far the order of the layers' shares is the same from seed to seed and from model to model."""
    runs = told_apart(LayerRun(run.name, run.label, kinds) for run, kinds in held if kind in kinds)
    if not 1 < len({run.model for run in runs}) <= MODELS:
        return None
    found = compare_runs(runs, kind)
    rows = [[m["model"], "its own seeds", str(len(m["layers"])), _number(m["agreement"]), "–", "–", "–"] for m in found["models"]]
    rows += [
        [c["a"], c["b"], str(c["layers"]), *(_number(c[key]) for key in ("spearman", "spearman_p", "kendall", "kendall_p"))]
        for c in found["correlations"] if c["figure"] == "share"
    ]  # fmt: skip
    heads = ["model", "against", "layers", "Spearman's ρ", "p", "Kendall's τ", "p of τ"]
    return Table(heads, rows, f"Order of the layers' shares, {KINDS[kind]}: means over seeds; p over all orders of up to 8 layers")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
