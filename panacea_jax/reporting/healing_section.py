"""How finished models were healed: the methods that were tried side by side, and the curves of radii that chose themselves."""

from collections.abc import Iterator
from pathlib import Path

from panacea_jax.evaluate.intervals import wilson
from panacea_jax.healing.choice import Share
from panacea_jax.healing.curve import COLUMNS, LOSSES, from_json
from panacea_jax.healing.radius import ChosenRadius
from panacea_jax.healing.table import HEADS, cells, rows_from_json
from panacea_jax.reporting.charts import line_chart
from panacea_jax.reporting.outcomes import Estimate, Found, Outcome
from panacea_jax.reporting.parts import Chart, Section, Table, numbered
from panacea_jax.reporting.scores import tradeoff_section
from panacea_jax.untrusted import parsing, read_object

RADIUS, HEALED = "radius.json", "heal.json"
CURVES = 12
"""Radii whose curves are drawn; of more the text says so."""


def healing_section(found: Found) -> Section | None:
    """Per model healed by several methods a table and its trade-off, per radius that chose itself two pictures; None without either.

    Raises:
        InputError: a heal.json or radius.json that is none of ours.
    """
    charts: list[Chart] = []
    tables = []
    for where, path in _files(found, HEALED):
        with parsing(path, "not ours"):
            table, outcomes = _tried(where, path)
            drawn = tradeoff_section(Found(found.folder, outcomes, []))
        tables.append(table)
        if drawn:
            charts += [c._replace(name=f"healed_{c.name}", title=f"{c.title}: {where}, held-out records") for c in drawn.charts]
    radii = list(_files(found, RADIUS))
    for where, path in radii[:CURVES]:
        with parsing(path, "not ours"):
            charts += list(_curve(where, from_json(read_object(path, strict=True))))
    if not charts and not tables:
        return None
    text = ["By held-out records, which radii and methods were chosen on; the scores above are of others. Broken line: the radius chosen."]
    text += [f"The first {CURVES} of {len(radii)} radii are drawn."] if len(radii) > CURVES else []
    return Section("Healing", text, numbered(charts), tables)


def _files(found: Found, name: str) -> Iterator[tuple[str, Path]]:
    """Files of a name that stages left, or methods tried within one, each once; with the run, and the method, that they are of."""
    seen = set()
    for run in found.runs:
        for folder in run.stages.values():
            for path in (folder / name, *sorted(folder.glob(f"*/heal/{name}"))):
                if path.is_file() and path.resolve() not in seen:
                    seen.add(path.resolve())
                    yield run.name if path.parent == folder else f"{run.name}, {path.parents[1].name}", path


def _tried(where: str, path: Path) -> tuple[Table, list[Outcome]]:
    """The lines of a heal.json as a table, and those that were measured."""
    rows, best, budget = rows_from_json(read_object(path, strict=True))
    lines = [cells(row, rows, best, budget) for row in rows]
    outcomes = [Outcome(row.method, {n: _estimate(s) for n, s in row.figures.items()}) for row in rows if row.figures is not None]
    return Table(HEADS, lines, f"{where}: methods side by side, held-out records"), outcomes


def _estimate(share: Share) -> Estimate:
    low, high = wilson(share.k, share.n)
    return Estimate(share.percent, 100 * low, 100 * high)


def _curve(where: str, found: ChosenRadius) -> Iterator[Chart]:
    """Figures over the radius, and losses."""
    answered = [point for point in found.points if point.figures]
    shares = [
        {"series": title, "run": title, "x": point.radius, **dict(zip(("y", "low", "high"), _estimate(point.figures[name])))}
        for name, title in COLUMNS.items() for point in answered if name in point.figures
    ]  # fmt: skip
    nats = [
        {"series": title, "run": title, "x": point.radius, "y": point.losses[name]}
        for name, title in LOSSES.items() for point in found.points if name in point.losses and point.radius <= answered[-1].radius
    ]  # fmt: skip
    for name, values, what, percent in (("figures", shares, "held-out records (%)", True), ("losses", nats, "loss (nats a token)", False)):
        if values:
            spec = line_chart(values, "radius", what, percent, points=True, marked=found.radius)
            title = f"{where}: {what} over the radius, {found.radius:.4g} chosen"
            yield Chart(f"radius_{name}", title, spec, f"{title}, {len({v['x'] for v in values})} radii")
