"""CSV as a spreadsheet may open it: the one writer of every table, in which no text is taken for a formula."""

import csv
import io
from collections.abc import Iterable
from typing import Any

# What Excel, LibreOffice and Google Sheets take for the beginning of a formula.
_ACTS = ("=", "+", "-", "@", "\t", "\r")


def as_csv_text(lines: Iterable[Iterable[Any]], *, quote_all: bool = False) -> str:
    """Lines of cells as CSV with "\\n" between them; text that would act gets an apostrophe in front, None is an empty cell.

    Args:
        lines: the heads first; numbers stay as Python writes them.
        quote_all: of sheets of prose, which people open.
    """
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL, lineterminator="\n")
    writer.writerows([_cell(value) for value in line] for line in lines)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")
    return f"'{text}" if text.startswith(_ACTS) else text
