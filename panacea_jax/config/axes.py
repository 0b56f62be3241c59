"""The section ``sweep``: axes, written ``KEY=VALUES`` with commas between the values or as a range, and how they are gone over."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from panacea_jax.config.defaults import keys
from panacea_jax.config.methods import one_of, require
from panacea_jax.config.recipes import require_key
from panacea_jax.config.variation import read_value
from panacea_jax.errors import InputError

SAMPLERS = ("grid", "random", "tpe", "nsga2")
# Figures of a finished run, and whether higher is better.
OBJECTIVES = {"hs": False, "hs_plus": False, "fa": True, "benign": True, "hs_attacked": False}

_KEY = "config.sweep.over"
# Their keys are about many runs, not about one.
_FOREIGN = ("compare.", "after.", "sweep.")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?::(log)?(\d*))?", re.IGNORECASE)


class Span(NamedTuple):
    """A range to draw from, both ends included; ``whole``: of whole numbers, ``log``: evenly in the logarithm."""

    low: float
    high: float
    log: bool
    whole: bool

    def points(self, count: int) -> tuple[float | int, ...]:
        """So many numbers of it at equal distances; of whole numbers the nearest, each once."""
        spaced = np.geomspace if self.log else np.linspace
        numbers = [float(f"{x:.12g}") for x in spaced(self.low, self.high, count)]  # 0.001, not 0.0010000000000000002
        return tuple(dict.fromkeys(map(round, numbers) if self.whole else numbers))


class Axis(NamedTuple):
    """One key of a sweep and what it may be: one of ``values``, or where there are none any number of ``span``."""

    key: str
    values: tuple[Any, ...] = ()
    span: Span | None = None

    def points(self) -> tuple[Any, ...]:
        """All that it may be, of a range of whole numbers too; () where that cannot be counted."""
        span = self.span
        if span is None or not span.whole or span.log:
            return self.values
        return tuple(range(int(span.low), int(span.high) + 1))

    def first(self) -> Any:
        """The first value, or the lower end."""
        if self.span is None:
            return self.values[0]
        return int(self.span.low) if self.span.whole else self.span.low


def validate_sweep(config: ConfigDict) -> None:
    """Check the section ``sweep``.

    Raises:
        InputError: the first impossible value, by its key.
    """
    sweep = config.sweep
    one_of(sweep.sampler, "sweep.sampler", SAMPLERS)
    require(len(sweep.objectives) > 0, "sweep.objectives", sweep.objectives, "name at least one")
    figures = [str(name).removeprefix("-") for name in sweep.objectives]
    for name, figure in zip(sweep.objectives, figures):
        one_of(figure, "sweep.objectives", tuple(OBJECTIVES))
        require(figures.count(figure) == 1, "sweep.objectives", name, "is there twice")
    axes = parse_axes(sweep.over, config)
    if sweep.sampler != "grid":
        require(sweep.trials > 0, "sweep.trials", sweep.trials, f"{sweep.sampler} draws; say how many runs")
        return
    rule = "a grid has as many runs as it has points; to draw, set config.sweep.sampler"
    require(sweep.trials == 0, "sweep.trials", sweep.trials, rule)
    for axis in axes:
        rule = "a grid has to know how many numbers of a range: LOW..HIGH:5 or LOW..HIGH:log5"
        require(bool(axis.points()), "sweep.over", axis.key, rule)


def objective(name: str) -> tuple[str, bool]:
    """The figure of an objective, and whether more of it is wanted: of ``hs`` less, of an attacker's ``-hs`` more."""
    figure = name.removeprefix("-")
    return figure, OBJECTIVES[figure] == (figure == name)


def parse_axes(entries: Sequence[str], config: ConfigDict) -> list[Axis]:
    """The axes of a sweep, in the order in which they are written.

    Args:
        entries: ``KEY=A,B,C``, commas inside brackets not counted; or ``KEY=LOW..HIGH``, of whole numbers all of them, else any number
            between; ``KEY=LOW..HIGH:log``, any number evenly in the logarithm; ``…:5`` and ``…:log5``, five numbers at equal distances.
        config: whose keys they are.

    Raises:
        InputError: an entry of another form, a key that is none or is there twice, or a value of the wrong type.
    """
    known, axes = set(keys(config)), list[Axis]()
    for entry in map(str, entries):
        key, equals, text = (part.strip() for part in entry.partition("="))
        key = key.removeprefix("config.")
        if not equals or not text:
            raise InputError(f"{_KEY}: {entry!r} is not KEY=VALUE,VALUE or KEY=LOW..HIGH")
        require_key(config, key)
        if key not in known or key.startswith(_FOREIGN):
            raise InputError(f"{_KEY}: {entry!r}: no key of a single run")
        if key in (axis.key for axis in axes):
            raise InputError(f"{_KEY}: {key} is there twice")
        ranged = _RANGE.fullmatch(text)
        axes.append(_range(key, ranged, config) if ranged else _list(key, text, config))
    return axes


def _list(key: str, text: str, config: ConfigDict) -> Axis:
    values = tuple(read_value(part.strip(), key, config, _KEY) for part in _alternatives(text))
    if len(set(map(repr, values))) < len(values):
        raise InputError(f"{_KEY}: {key}={text}: a value is there twice")
    return Axis(key, values)


def _range(key: str, found: re.Match[str], config: ConfigDict) -> Axis:
    low, high, log, count = found.groups()
    ends = [read_value(text, key, config, _KEY) for text in (low, high)]
    written = f"{_KEY}: {key}={low}..{high}"
    if not all(isinstance(end, int | float) for end in ends):
        raise InputError(f"{written}: the key takes no number")
    span = Span(float(low), float(high), bool(log), all(isinstance(end, int) for end in ends))
    if not span.low < span.high:
        raise InputError(f"{written}: the lower end comes first")
    if span.log and span.low <= 0:
        raise InputError(f"{written}:log: both ends above 0")
    if count:
        if int(count) < 2:
            raise InputError(f"{written}:{log or ''}{count}: two numbers or more")
        return Axis(key, span.points(int(count)))
    return Axis(key, span=span)


def _alternatives(text: str) -> list[str]:
    """The parts between commas that stand in no bracket and no quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return parts
