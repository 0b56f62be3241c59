"""Vega-Lite, in the few forms that a report draws: intervals, a trade-off, lines, a heat map and stacked bars.

Every function returns a specification without width and configuration, which the page and the pictures bring. Text in the data is
shown as it is: no field is an address or markup.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from panacea_jax.analysis.layer_pictures import COLOURS

Spec = dict[str, Any]
Values = Sequence[Mapping[str, Any]]
PERCENT = {"domain": [0, 100]}
WIDE = 100
ROW, LINE = 22, 12
"""Height of a row of a picture, and of one of several lines in it, in pixels."""


def _field(name: str, kind: str, title: str | None = None, **more: Any) -> Spec:
    """One channel of an encoding."""
    return {"field": name, "type": kind, "title": title, **more}


def _names(values: Values) -> list[str]:
    """The series, in the order in which they come."""
    return list(dict.fromkeys(value["series"] for value in values))


def _series(values: Values) -> Spec:
    """Colour of a series by its name."""
    names = _names(values)
    colours = {"range": list(COLOURS[: len(names)])} if len(names) <= len(COLOURS) else {"scheme": "tableau20"}
    return _field("series", "nominal", scale={"domain": names, **colours})


def _tip(**titles: str) -> list[Spec]:
    """What a pointer on a mark is told: titles by field; numbers keep a decimal or four figures."""
    return [{"field": name, "title": title} for name, title in titles.items()]


def interval_chart(values: Values, title: str) -> Spec:
    """A line for every method and a colour for every case: its mean and its interval.

    Args:
        values: ``{"method", "mean", "low", "high", "series", "shown"}``; bounds may be None.
        title: of the axis, in percent.
    """
    methods, cases = list(dict.fromkeys(value["method"] for value in values)), _names(values)
    place = {"y": _field("method", "nominal", sort=methods, axis={"labelLimit": 190}), "color": _series(values)}
    height = ROW
    if len(values) > len(methods):  # several cases of a method: below each other
        place["yOffset"] = {"field": "series", "scale": {"domain": cases}}
        height = 8 + LINE * len(cases)
    return {
        "data": {"values": list(values)},
        "height": height * len(methods),
        "encoding": {**place, "tooltip": _tip(method="method", series="case", shown=title)},
        "layer": [
            {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": {
                "x": _field("low", "quantitative", title, scale=PERCENT), "x2": {"field": "high"},
            }},
            {"mark": {"type": "point", "filled": True, "size": 70, "opacity": 1}, "encoding": {"x": _field("mean", "quantitative", title)}},
        ],
    }  # fmt: skip


def tradeoff_chart(values: Values, x: str, y: str) -> Spec:
    """Points with intervals in both directions, and the Pareto front as a dashed line through those on it.

    Args:
        values: ``{"label", "series", "x", "x_low", "x_high", "y", "y_low", "y_high", "front", "shown"}``; bounds may be None.
        x: title of its axis, in percent.
        y: likewise.
    """
    horizontal = _field("x", "quantitative", x, scale=PERCENT)
    vertical = _field("y", "quantitative", y, scale=PERCENT)
    colour = _series(values)
    thin = {"type": "rule", "opacity": 0.45}
    return {
        "data": {"values": list(values)},
        "height": 300,
        "layer": [
            {
                "transform": [{"filter": {"field": "front", "equal": True}}],
                "mark": {"type": "line", "strokeDash": [5, 4], "color": "#888888"},
                "encoding": {"x": horizontal, "y": vertical, "order": {"field": "x"}},
            },
            {"mark": thin, "encoding": {
                "x": _field("x_low", "quantitative", x), "x2": {"field": "x_high"}, "y": vertical, "color": colour,
            }},
            {"mark": thin, "encoding": {
                "y": _field("y_low", "quantitative", y), "y2": {"field": "y_high"}, "x": horizontal, "color": colour,
            }},
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {
                    "x": horizontal, "y": vertical, "color": colour, "shape": _field("series", "nominal", scale={"domain": _names(values)}),
                    "tooltip": _tip(label="method", shown="figures"),
                },
            },
        ],
    }  # fmt: skip


def line_chart(
    values: Values, x: str, y: str, percent: bool = False, points: bool = False, marked: float | None = None
) -> Spec:  # fmt: skip
    """A line a series, and of series with several runs one a run; the axis is logarithmic where x spans ``WIDE`` times itself.

    Args:
        values: ``{"series", "run", "x", "y"}``; with "low" and "high" a bar through the point.
        x: title of its axis.
        y: likewise.
        percent: the axis of y is 0 to 100.
        points: every value is marked, which also is for values that someone chose.
        marked: an x with a broken line through it.
    """
    vertical = _field("y", "quantitative", y, scale=PERCENT if percent else {"zero": False})
    smallest, largest = (bound(value["x"] for value in values) for bound in (min, max))
    kind = "log" if points and 0 < smallest <= largest / WIDE else "linear"
    across = _field("x", "quantitative", x, scale={"type": kind, "nice": False, **({"zero": False} if kind == "linear" else {})})
    encoding = {"x": across, "color": _series(values)}
    line = {
        "mark": {"type": "line", "point": points, "strokeWidth": 1.6},
        "encoding": {"y": vertical, "detail": _field("run", "nominal"), "tooltip": _tip(run="run", x=x, y=y)},
    }
    bar = {"mark": {"type": "rule", "opacity": 0.5}, "encoding": {"y": _field("low", "quantitative", y), "y2": {"field": "high"}}}
    layers: list[Spec] = [line, bar] if any(value.get("low") is not None for value in values) else [line]
    if marked is not None:
        place: Spec = {"x": {"datum": marked, "type": "quantitative"}, "color": {"value": "#888888"}}
        layers.append({"mark": {"type": "rule", "strokeDash": [5, 4]}, "encoding": place})
    return {"data": {"values": list(values)}, "height": 220, "encoding": encoding, "layer": layers}


def heat_map(values: Values, x: str, y: str, title: str) -> Spec:
    """A cell for every pair of values, coloured by a percentage that is written in it.

    Args:
        values: ``{"x", "y", "value", "shown"}``.
        x: title of its axis.
        y: likewise.
        title: of the percentage.
    """
    across = _field("x", "ordinal", x, axis={"labelAngle": 0})
    down = _field("y", "ordinal", y, sort="descending")
    rows = len({value["y"] for value in values})
    return {
        "data": {"values": list(values)},
        "height": max(2 * ROW * rows, 3 * ROW),
        "encoding": {"x": across, "y": down, "tooltip": _tip(x=x, y=y, shown=title)},
        "layer": [
            {"mark": "rect", "encoding": {
                "color": _field("value", "quantitative", title, scale={**PERCENT, "scheme": "viridis"}, legend={"gradientLength": 160}),
            }},
            {"mark": {"type": "text", "fontSize": 12}, "encoding": {
                "text": _field("value", "quantitative", format=".0f"),
                "color": {"condition": {"test": "datum.value > 55", "value": "black"}, "value": "white"},
            }},
        ],
    }  # fmt: skip


def bar_chart(values: Values, x: str, y: str) -> Spec:
    """Bars over whole numbers, stacked by series.

    Args:
        values: ``{"x", "y", "series"}``.
        x: title of its axis.
        y: likewise.
    """
    return {
        "data": {"values": list(values)},
        "height": 200,
        "mark": "bar",
        "encoding": {
            "x": _field("x", "ordinal", x, axis={"labelAngle": 0, "labelOverlap": True}), "y": _field("y", "quantitative", y),
            "color": _series(values), "tooltip": _tip(x=x, series="part", y=y),
        },
    }  # fmt: skip
