"""What a report is made of, before it becomes a page, Markdown or a picture: sections of text, tables and charts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """A table of text.

    Attributes:
        heads: of its columns.
        rows: as many cells each.
        title: above it.
        folded: shown when it is asked for.
        foreign: holds what models and users wrote; it stays on the page, folded.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False
    foreign: bool = False


def filled(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table without the columns that say nothing in any row."""
    kept = [i for i in range(len(heads)) if any(row[i] not in ("", "–") for row in rows)]
    return Table([heads[i] for i in kept], [[row[i] for i in kept] for row in rows])


class Chart(NamedTuple):
    """A picture.

    Attributes:
        name: of its file, unique in a report.
        title: above it.
        spec: Vega-Lite, with its data; width and configuration come with the page.
        says: what it shows, for those who cannot see it.
    """

    name: str
    title: str
    spec: Mapping[str, Any]
    says: str


def numbered(charts: Sequence[Chart]) -> list[Chart]:
    """The charts, of those with one name the second and later ones with a number behind it."""
    names = [chart.name for chart in charts]
    counts = [names[:i].count(name) for i, name in enumerate(names)]
    return [chart._replace(name=f"{chart.name}_{n + 1}") if n else chart for chart, n in zip(charts, counts)]


class Section(NamedTuple):
    """A part of the report under a heading."""

    title: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[str] = ()
