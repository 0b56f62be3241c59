"""Figures over what was varied: a heat map over two numbers such as ρ and λ, a line over one."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from panacea_jax.defences.spec import parse_stack
from panacea_jax.errors import InputError
from panacea_jax.reporting.charts import heat_map, line_chart
from panacea_jax.reporting.outcomes import TITLES, Found, Outcome
from panacea_jax.reporting.parts import Chart, Section, numbered

FIGURES = ("hs", "fa", "benign")
POISON, SYMBOLS = "poison ratio", {"rho": "ρ", "lam": "λ"}
_Place = tuple[str, dict[str, float]]


def variation_section(found: Found) -> Section | None:
    """The pictures, of outcomes and of a grid's candidates; None where nothing was varied in numbers."""
    charts: list[Chart] = []
    for outcomes, where in ((found.outcomes, ""), (found.tried, " (development)")):
        places = [(place_of(o), o) for o in outcomes if o.attacked]
        charts += _charts(places, where)
    text = [
        "Means; a heat map where two numbers were varied together, a line where one was, with everything else equal. The colours run "
        "from 0 to 100 in every map, whichever end is the better one."
    ]
    return Section("What was varied", text, numbered(charts)) if charts else None


def place_of(outcome: Outcome) -> _Place:
    """``(name, numbers)``: the numbers that an outcome is at, by key, and what else it is called."""
    name, numbers = _of_method(outcome.method)
    if outcome.ratio is not None:
        numbers[POISON] = outcome.ratio
    for key, value in outcome.setting.items():
        if _is_number(value):
            numbers[_short(key)] = float(value)
        else:
            name += f", {key}={value}"
    return name, numbers


def _of_method(method: str) -> _Place:
    """A stack of methods without its numbers, and these; a name that is no such stack as it is."""
    source, colon, own = method.rpartition(": ")  # of several folders
    try:
        stack = parse_stack(own, "report")
    except InputError:
        return method, {}
    parts = [part for part in (stack.align, stack.finetune, stack.heal) if part]
    numbers: dict[str, float] = {}
    names = []
    for part in parts:
        known = {key: value for key, value in part.settings if _is_number(value)}
        prefix = f"{part.name} " if len(parts) > 1 else ""
        numbers |= {f"{prefix}{SYMBOLS.get(key, key)}": float(value) for key, value in known.items()}
        names.append(str(part._replace(settings=tuple(setting for setting in part.settings if setting[0] not in known))))
    return f"{source}{colon}{'+'.join(names) or 'sft'}", numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(key: str) -> str:
    """A key as an axis is called: the last word, with the part before it where that is not the defence."""
    section, _, word = key.rpartition(".")
    symbol = SYMBOLS.get(word, word)
    return symbol if section in ("", "defence") else f"{section}.{symbol}"


def _charts(places: Sequence[tuple[_Place, Outcome]], where: str) -> list[Chart]:
    """A map over the two numbers of a method that were varied together, and a line over every other number, of each figure."""
    charts: list[Chart] = []
    mapped: set[tuple[str, str]] = set()
    for pair in _pairs(place for place, _ in places):
        for rest, group in _alike(places, pair).items():
            if all(len({numbers[axis] for (_, numbers), _ in group}) > 1 for axis in pair):
                charts += [chart for figure in FIGURES if (chart := _map(group, pair, figure, rest + where))]
                mapped |= {(name, axis) for (name, _), _ in group for axis in pair}
    for axis in dict.fromkeys(axis for (_, numbers), _ in places for axis in numbers):
        lines = {
            rest: group
            for rest, group in _alike([p for p in places if (p[0][0], axis) not in mapped], (axis,)).items()
            if len({numbers[axis] for (_, numbers), _ in group}) > 1
        }  # fmt: skip
        charts += [chart for figure in FIGURES if (chart := _lines(lines, axis, figure, where))]
    return charts


def _pairs(places: Iterable[_Place]) -> list[tuple[str, str]]:
    """The first two numbers of each method that were varied together."""
    held: dict[str, list[dict[str, float]]] = {}
    for name, numbers in places:
        held.setdefault(name, []).append(numbers)
    found = []
    for several in held.values():
        for a, b in itertools.combinations(several[0], 2):
            points = {(numbers[a], numbers[b]) for numbers in several if {a, b} <= numbers.keys()}
            if all(len(set(axis)) > 1 for axis in zip(*points)) and len(points) > 3:
                found.append((a, b))
                break
    return list(dict.fromkeys(found))


def _alike(places: Sequence[tuple[_Place, Outcome]], axes: Sequence[str]) -> dict[str, list[tuple[_Place, Outcome]]]:
    """Outcomes that have these axes, by everything else that they are."""
    groups: dict[str, list[tuple[_Place, Outcome]]] = {}
    for (name, numbers), outcome in places:
        if all(axis in numbers for axis in axes):
            others = [f"{key}={value:g}" for key, value in numbers.items() if key not in axes]
            groups.setdefault(", ".join([name, *others]), []).append(((name, numbers), outcome))
    return groups


def _map(group: Sequence[tuple[_Place, Outcome]], axes: tuple[str, str], figure: str, rest: str) -> Chart | None:
    x, y = axes
    values = [
        {"x": numbers[x], "y": numbers[y], "value": held.mean, "shown": str(held)}
        for (_, numbers), outcome in group
        if (held := outcome.figures.get(figure))
    ]  # fmt: skip
    if not values:
        return None
    title = f"{TITLES[figure]} (%): {rest}"
    return Chart(f"map_{figure}", title, heat_map(values, x, y, TITLES[figure]), f"{TITLES[figure]} over {x} and {y}, {len(values)} cells")


def _lines(lines: Mapping[str, Sequence[tuple[_Place, Outcome]]], axis: str, figure: str, where: str) -> Chart | None:
    values: list[dict[str, Any]] = [
        {"series": rest, "run": rest, "x": numbers[axis], "y": held.mean, "low": held.low, "high": held.high}
        for rest, group in lines.items()
        for (_, numbers), outcome in group
        if (held := outcome.figures.get(figure))
    ]  # fmt: skip
    if not values:
        return None
    title = f"{TITLES[figure]} (%) over {axis}{where}"
    spec = line_chart(values, axis, f"{TITLES[figure]} (%)", percent=True, points=True)
    return Chart(f"over_{figure}", title, spec, f"{title}, {len(lines)} lines")
