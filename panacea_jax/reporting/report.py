"""The command ``report``: one page, and the same as Markdown, CSV and Parquet."""

import datetime
from collections.abc import Sequence
from pathlib import Path

from panacea_jax.errors import InputError
from panacea_jax.reporting.epochs import epochs_section
from panacea_jax.reporting.evidence import answers_section, failure_section, judges_section
from panacea_jax.reporting.gather import gather
from panacea_jax.reporting.harmless import harmless, shown
from panacea_jax.reporting.healing_section import healing_section
from panacea_jax.reporting.in_short import short_section
from panacea_jax.reporting.layer_section import layers_section
from panacea_jax.reporting.markdown import report_markdown
from panacea_jax.reporting.page import GENERATOR, as_page, as_picture
from panacea_jax.reporting.published import published_section
from panacea_jax.reporting.rerun import rerun_section
from panacea_jax.reporting.scores import cost_section, scores_section, tradeoff_section
from panacea_jax.reporting.sheets import as_parquet, as_sheet, outcome_rows
from panacea_jax.reporting.training import training_section
from panacea_jax.reporting.variation import variation_section
from panacea_jax.workdir import versions, write_bytes, write_text

SECTIONS = (
    short_section, scores_section, tradeoff_section, variation_section, failure_section, epochs_section, training_section, layers_section,
    healing_section, judges_section, published_section, cost_section, answers_section, rerun_section,
)  # fmt: skip
"""In the order of the page; one that has nothing to say returns None."""
PAGE = "index.html"


def write_report(workdir: Path, against: Sequence[Path] = (), out: Path | None = None, *, show_records: bool = False) -> Path:
    """Write ``index.html``, ``report.md`` with its ``figures/``, ``report.csv`` and ``report.parquet``; returns the page.

    Args:
        workdir: of a comparison, a sweep, a run, or a folder of runs.
        against: further ones to set beside it.
        out: where to; by default ``WORKDIR/report``. An earlier report there is replaced.
        show_records: with the first answers of every set; else the report holds no text of a record.

    Raises:
        InputError: nothing to report, a damaged file, a place that cannot be written or holds something else, or vl-convert-python is
            missing.
    """
    _refuse_foreign(out or workdir / "report")
    found = gather(workdir, against)
    chosen = [make for make in SECTIONS if show_records or make is not answers_section]
    sections = [harmless(section) for make in chosen if (section := make(found))]
    title = shown(f"Report: {', '.join(path.resolve().name for path in (workdir, *against))}")
    made = f"{datetime.date.today().isoformat()} by panacea_jax {versions()['panacea_jax']}"
    subtitle = f"{len(found.outcomes)} outcomes of {len(found.runs)} runs. Made {made}."
    page = as_page(title, subtitle, sections)
    rows = outcome_rows(found)
    folder = out or workdir / "report"
    figures = folder / "figures"
    try:
        figures.mkdir(parents=True, exist_ok=True)
        write_text(folder / PAGE, page)  # first: it tells the folder of a report that was cut short
        for earlier in figures.glob("*.svg"):
            earlier.unlink()
        for chart in (chart for section in sections for chart in section.charts):
            write_text(figures / f"{chart.name}.svg", as_picture(chart))
        write_text(folder / "report.md", report_markdown(title, subtitle, sections, lambda chart: f"figures/{chart.name}.svg"))
        write_text(folder / "report.csv", as_sheet(rows))
        write_bytes(folder / "report.parquet", as_parquet(rows))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
    return folder / PAGE


def _refuse_foreign(folder: Path) -> None:
    """An earlier report may be replaced; other files may not.

    Raises:
        InputError: the folder holds something else.
    """
    page = folder / PAGE
    earlier = page.is_file() and GENERATOR in page.read_text("utf-8", errors="replace")[:4096]
    if not earlier and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: not empty and without a report of ours; choose another --out")
