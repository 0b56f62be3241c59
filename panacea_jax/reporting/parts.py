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


class Section(NamedTuple):
    """A part of the report under a heading."""

    title: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[str] = ()
