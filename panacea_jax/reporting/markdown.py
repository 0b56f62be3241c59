"""The report as Markdown, for a repository or a ticket."""

from collections.abc import Callable, Sequence

from panacea_jax.reporting.parts import Chart, Section


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
