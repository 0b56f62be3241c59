"""The outcomes as rows, and these as CSV and Parquet."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from panacea_jax.reporting.harmless import shown
from panacea_jax.reporting.outcomes import TITLES, Found
from panacea_jax.spreadsheet import as_csv_text


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
    """CSV, the heads first."""
    return as_csv_text([rows[0] if rows else (), *(row.values() for row in rows)])


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
