"""Sections whose text may stand anywhere: what models, users and file names say is text, and nothing in it acts."""

from collections.abc import Mapping
from typing import Any

from panacea_jax.reporting.parts import Chart, Section, Table
from panacea_jax.terminal import safe_text

CELL, COMMAND = 400, 20_000
"""Characters of a cell and of a command; longer ones are cut."""


def shown(text: str, most: int = CELL) -> str:
    """Text of models, users and file names as it may stand anywhere: nothing in it acts, and it is cut with a word on how much there is."""
    return safe_text(text[:most]) + (f" … ({len(text) - most} more characters)" if len(text) > most else "")


def _all_shown(value: Any) -> Any:
    """The same of every string in lists and dictionaries."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, Mapping):
        return {key: _all_shown(held) for key, held in value.items()}
    return [_all_shown(held) for held in value] if isinstance(value, list | tuple) else value


def harmless(section: Section) -> Section:
    """A section whose text may stand anywhere."""
    tables = [
        Table(list(map(shown, t.heads)), [list(map(shown, row)) for row in t.rows], shown(t.title), t.folded, t.foreign)
        for t in section.tables
    ]  # fmt: skip
    charts = [Chart(c.name, shown(c.title), _all_shown(c.spec), shown(c.says)) for c in section.charts]
    text, commands = ([shown(line, COMMAND) for line in lines] for lines in (section.text, section.commands))
    return Section(section.title, text, charts, tables, commands)
