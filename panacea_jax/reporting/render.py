"""From sections to files: the page with everything in it, Markdown with its pictures, and the outcomes as CSV and Parquet."""

import base64
import csv
import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from panacea_jax.errors import InputError
from panacea_jax.evaluate.agreement import sheet_cell
from panacea_jax.reporting.charts import Spec
from panacea_jax.reporting.outcomes import TITLES, Found
from panacea_jax.reporting.parts import Chart, Section, Table
from panacea_jax.terminal import safe_text

VEGA_LITE = "6.4"
GENERATOR = "panacea_jax report"
"""What a page says that it was made by."""
CELL, COMMAND = 400, 20_000
"""Characters of a cell and of a command; longer ones are cut."""
WIDTH = 560
"""Of a picture in a file, in pixels."""
_OUTLINE = {"domainColor": "#888888", "tickColor": "#888888", "gridColor": "#888888", "gridOpacity": 0.25, "titleFontWeight": "normal"}


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


def _library() -> Any:
    """vl-convert, which brings Vega, Vega-Lite and vega-embed with it.

    Raises:
        InputError: it is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise InputError("report: needs vl-convert-python; pip install 'panacea_jax[report]'") from error
    return vl_convert


@functools.cache
def _scripts() -> str:
    """Vega, Vega-Lite and vega-embed as one script; seconds to make."""
    return str(_library().javascript_bundle(vl_version=VEGA_LITE))


def as_page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """One HTML page without a request: styles, scripts, data and pictures are in it, and its policy forbids all else.

    Args:
        title: of the page.
        subtitle: below it.
        sections: harmless ones.

    Raises:
        InputError: vl-convert-python is missing.
    """
    here = Path(__file__).parent
    style, script = ((here / name).read_text("utf-8") for name in ("page.css", "page.js"))
    _library()  # that it is there
    library = _scripts()
    specs = {c.name: {**_complete(c, "currentColor"), "width": "container"} for s in sections for c in s.charts}
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string((here / "page.html").read_text("utf-8"))
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return template.render(
        title=title, subtitle=subtitle, sections=sections, policy=policy, generator=GENERATOR, style=style, script=script, library=library,
        # "<" would end the element, or begin a comment in it
        specs=json.dumps(specs, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
    )  # fmt: skip


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _complete(chart: Chart, ink: str) -> Spec:
    """A chart's specification with what all have in common; ``ink`` is the colour of its words."""
    words = {"labelColor": ink, "titleColor": ink}
    config = {
        "background": None, "font": "system-ui, sans-serif", "view": {"stroke": None},
        "axis": {**words, **_OUTLINE, "labelFontSize": 11, "titleFontSize": 12},
        "legend": {**words, "orient": "bottom", "columns": 1, "labelLimit": 300, "title": None, "symbolOpacity": 1},
    }  # fmt: skip
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json", "description": chart.says,
        "autosize": {"type": "fit-x", "contains": "padding"}, "config": config, **chart.spec,
    }  # fmt: skip


def as_picture(chart: Chart) -> str:
    """A chart as SVG on white, for documents."""
    spec = _complete(chart, "black")
    spec["config"] |= {"background": "white", "font": "sans-serif"}
    return str(_library().vegalite_to_svg({**spec, "width": WIDTH}, vl_version=VEGA_LITE))


def report_markdown(title: str, subtitle: str, sections: Sequence[Section], picture: Callable[[Chart], str]) -> str:
    """The report for a repository or a ticket; what models and users wrote stays on the page.

    Args:
        title: of the report.
        subtitle: below it.
        sections: harmless ones.
        picture: address of a chart's file.
    """
    lines = [f"# {_quoted(title)}", "", _quoted(subtitle)]
    for section in sections:
        lines += ["", f"## {section.title}"]
        lines += [part for line in section.text for part in ("", _quoted(line))]
        lines += [part for chart in section.charts for part in ("", f"![{_quoted(chart.title)}]({picture(chart)})")]
        for table in section.tables:
            lines += ["", f"### {_quoted(table.title)}"] if table.title else []
            if table.foreign:
                lines += ["", f"{len(table.rows)} answers, in index.html."]
                continue
            rows = [table.heads, ["---"] * len(table.heads), *table.rows]
            lines += ["", *("| " + " | ".join(map(_quoted, row)) + " |" for row in rows)]
        if section.commands:
            lines += ["", *(f"    {' '.join(command.split())}" for command in section.commands)]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Text as Markdown shows it, in one line: no markup, no element, no link."""
    line = " ".join(text.split())
    return line if line == "---" else "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in line)


def outcome_rows(found: Found) -> list[dict[str, Any]]:
    """A row an outcome, numbers unrounded; None is not known."""
    keys = list(dict.fromkeys(key for o in found.outcomes for key in o.setting))
    names = [name for name in TITLES if any(name in o.figures for o in found.outcomes)]
    rows = []
    for outcome in found.outcomes:
        row: dict[str, Any] = {"method": shown(outcome.method), "poison_ratio": outcome.ratio}
        row |= {shown(key): None if key not in outcome.setting else shown(str(outcome.setting[key])) for key in keys}
        row["seeds"] = " ".join(map(str, outcome.seeds))
        for name in names:
            held = outcome.figures.get(name)
            parts = ("", "_low", "_high")
            row |= {f"{name}{part}": value for part, value in zip(parts, held or (None, None, None))}
        rows.append(row)
    return rows


def as_sheet(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV; text that a spreadsheet would take for a formula has an apostrophe in front."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([sheet_cell(head) for head in rows[0]] if rows else [])
    writer.writerows([sheet_cell(value) for value in row.values()] for row in rows)
    return out.getvalue()


def as_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Parquet: figures and poison ratios are numbers, all else is text."""
    import pyarrow
    import pyarrow.parquet

    text = ("method", "seeds")
    heads = list(rows[0]) if rows else []
    numbers = {head for head in heads if head not in text and all(isinstance(row[head], int | float | None) for row in rows)}
    schema = pyarrow.schema([(head, pyarrow.float64() if head in numbers else pyarrow.string()) for head in heads])
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows], schema=schema), out)
    return out.getvalue()
