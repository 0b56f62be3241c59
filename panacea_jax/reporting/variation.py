"""Figures over what was varied: a heat map over two numbers such as ρ and λ, a line over one."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from panacea_jax.defences.spec import parse_stack
from panacea_jax.errors import InputError
from panacea_jax.reporting.charts import heat_map, line_chart
from panacea_jax.reporting.outcomes import HEADLINES, TITLES, Found, Outcome
from panacea_jax.reporting.parts import Chart, Section

POISON, SYMBOLS = "poison ratio", {"rho": "ρ", "lam": "λ"}
_Place = tuple[str, dict[str, float]]


def variation_section(found: Found) -> Section | None:
    """The pictures, of outcomes and of a grid's candidates; None where nothing was varied in numbers."""
    charts: list[Chart] = []
    for outcomes, where in ((found.outcomes, ""), (found.tried, " (development)")):
        places = [(placed(o), o) for o in outcomes if o.attacked]
        charts += _charts(places, where, len(charts))
    text = [
        "Means; a heat map where two numbers were varied together, a line where one was, with everything else equal. The colours run "
        "from 0 to 100 in every map, whichever end is the better one."
    ]
    return Section("What was varied", text, charts) if charts else None


def placed(outcome: Outcome) -> _Place:
    """``(name, numbers)``: the numbers that an outcome is at, by key, and what else it is called."""
    name, numbers = _of_method(outcome.method)
    if outcome.ratio is not None:
        numbers[POISON] = outcome.ratio
    for key, value in outcome.setting.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers[_short(key)] = float(value)
        else:
            name += f", {key}={value}"
    return name, numbers


def _of_method(method: str) -> _Place:
    """A stack of methods without its numbers, and these; a name that is no such stack as it is."""
    try:
        stack = parse_stack(method, "report")
    except InputError:
        return method, {}
    numbers: dict[str, float] = {}
    names = []
    for part in filter(None, (stack.align, stack.finetune, stack.heal)):
        words = [(key, value) for key, value in part.settings if isinstance(value, bool) or not isinstance(value, int | float)]
        numbers |= {f"{part.name} {SYMBOLS.get(key, key)}": float(value) for key, value in part.settings if (key, value) not in words}
        names.append(str(part._replace(settings=tuple(words))))
    return "+".join(names) or "sft", numbers


def _short(key: str) -> str:
    """A key as an axis is called: the last word, with the part before it where that is not the defence."""
    section, _, word = key.rpartition(".")
    return f"{SYMBOLS.get(word, word)}" if section in ("", "defence") else f"{section}.{SYMBOLS.get(word, word)}"


def _charts(places: Sequence[tuple[_Place, Outcome]], where: str, number: int) -> list[Chart]:
    """A chart for every figure and pair of axes, or axis, along which several outcomes differ in nothing else."""
    charts: list[Chart] = []
    for figure in HEADLINES:
        there = [(place, o) for place, o in places if figure in o.figures]
        pairs = _pairs(place for place, _ in there)
        for pair in pairs:
            for rest, group in _alike(there, pair).items():
                xs, ys = ({p[1][axis] for p, _ in group} for axis in pair)
                if len(xs) > 1 and len(ys) > 1:
                    charts.append(_map(group, pair, figure, rest + where, f"map{number + len(charts)}"))
        covered = set(itertools.chain.from_iterable(pairs))
        for axis in dict.fromkeys(axis for (_, numbers), _ in there for axis in numbers):
            lines = {rest: group for rest, group in _alike(there, (axis,)).items() if len({p[1][axis] for p, _ in group}) > 1}
            if lines and (axis not in covered or max(map(len, lines.values())) > 2):
                charts.append(_lines(lines, axis, figure, where, f"over{number + len(charts)}"))
    return charts


def _pairs(places: Iterable[_Place]) -> list[tuple[str, str]]:
    """Pairs of axes that were varied together in one method: along each, outcomes that differ in it alone."""
    together: dict[tuple[str, str], dict[str, set[tuple[float, float]]]] = {}
    for name, numbers in places:
        for a, b in itertools.combinations(numbers, 2):
            together.setdefault((a, b), {}).setdefault(name, set()).add((numbers[a], numbers[b]))
    return [
        pair
        for pair, by_name in together.items()
        if any(len({x for x, _ in held}) > 1 and len({y for _, y in held}) > 1 and len(held) > 3 for held in by_name.values())
    ]  # fmt: skip


def _alike(places: Sequence[tuple[_Place, Outcome]], axes: Sequence[str]) -> dict[str, list[tuple[_Place, Outcome]]]:
    """Outcomes that have these axes, by everything else that they are."""
    groups: dict[str, list[tuple[_Place, Outcome]]] = {}
    for (name, numbers), outcome in places:
        if all(axis in numbers for axis in axes):
            others = [f"{key}={value:g}" for key, value in numbers.items() if key not in axes]
            groups.setdefault(", ".join([name, *others]), []).append(((name, numbers), outcome))
    return groups


def _map(group: Sequence[tuple[_Place, Outcome]], axes: tuple[str, str], figure: str, rest: str, name: str) -> Chart:
    x, y = axes
    values = [
        {"x": n[x], "y": n[y], "value": o.figures[figure].mean, "shown": str(o.figures[figure])} for (_, n), o in group
    ]  # fmt: skip
    title = f"{TITLES[figure]} (%): {rest}"
    return Chart(name, title, heat_map(values, x, y, TITLES[figure]), f"{TITLES[figure]} over {x} and {y}, {len(values)} cells")


def _lines(lines: dict[str, list[tuple[_Place, Outcome]]], axis: str, figure: str, where: str, name: str) -> Chart:
    values: list[dict[str, Any]] = [
        {"series": rest, "run": rest, "x": numbers[axis], "y": (held := o.figures[figure]).mean, "low": held.low, "high": held.high}
        for rest, group in lines.items()
        for (_, numbers), o in group
    ]  # fmt: skip
    title = f"{TITLES[figure]} (%) over {axis}{where}"
    return Chart(name, title, line_chart(values, axis, f"{TITLES[figure]} (%)", percent=True, points=True), f"{title}, {len(lines)} lines")
