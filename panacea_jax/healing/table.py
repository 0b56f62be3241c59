"""Several methods on one finished model, side by side: on the terminal, as JSON and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from panacea_jax.healing.choice import RULE, Budget, Share, choose, overdrawn
from panacea_jax.healing.curve import COLUMNS
from panacea_jax.progress import table_console

UNTREATED = "untreated"
NOTE = (
    "Figures are of held-out records that no method was given; radii that chose themselves and the best were chosen on them, so report "
    "others: `panacea generate` and `judge` on config.eval.tasks."
)


class Treated(NamedTuple):
    """One line: a method and what became of the model.

    Attributes:
        method: as it was asked for; ``UNTREATED`` for the model as it came.
        figures: see ``choice.Figures``; None where it was left out.
        change: norm of the change of the weights.
        seconds: that it took; None where it was not measured.
        why: it was left out, because.
    """

    method: str
    figures: Mapping[str, Share] | None = None
    change: float = 0.0
    seconds: float | None = None
    why: str = ""


def best_of(rows: Sequence[Treated], budget: Budget) -> Treated:
    """The line that ``choice.RULE`` takes; the first is the untreated model.

    Raises:
        InputError: as ``choice.choose``.
    """
    there = [row for row in rows if row.figures is not None]
    figures = [row.figures for row in there if row.figures is not None]
    return there[choose(figures, [row.change for row in there], budget)]


HEADS = ("method", *COLUMNS.values(), "‖change‖", "seconds", "")


def cells(row: Treated, rows: Sequence[Treated], best: Treated, budget: Budget) -> list[str]:
    """One line as text."""
    if row.figures is None:
        return [row.method, *("–" for _ in COLUMNS), "–", "–", f"left out: {row.why}"]
    untreated = rows[0].figures
    assert untreated is not None
    out = [COLUMNS[name] for name in overdrawn(row.figures, untreated, budget)]
    said = "best" if row is best else f"beyond its budget: {', '.join(out)}" if out else ""
    shares = (f"{row.figures[n].percent:.1f}" if n in row.figures else "–" for n in COLUMNS)
    seconds = "–" if row.seconds is None else f"{row.seconds:.0f}"
    return [row.method, *shares, f"{row.change:.4g}", seconds, said]


def rows_from_json(found: Mapping[str, Any]) -> tuple[list[Treated], Treated, Budget]:
    """Lines, the best of them and the budget, from the content of heal.json."""
    rows = []
    for row in found["rows"]:
        figures = {n: Share(s["k"], s["n"]) for n, s in row["figures"].items()}
        rows.append(Treated(row["method"], figures or None, row["change"], row["seconds"], row["left_out"]))
    return rows, next(row for row in rows if row.method == found["best"]), Budget(**found["budget"])


def show_rows(rows: Sequence[Treated], best: Treated, budget: Budget, lines: Sequence[str]) -> None:
    """Print the table, and lines below it."""
    console = table_console(200)
    table = Table(title="healed, by held-out records (percent)", title_justify="left")
    for head in HEADS:
        table.add_column(head, justify="left" if head in ("method", "") else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, cells(row, rows, best, budget)))
    console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def as_markdown(rows: Sequence[Treated], best: Treated, budget: Budget, lines: Sequence[str]) -> str:
    """The same as Markdown."""
    found = [HEADS, ["---"] * len(HEADS), *(cells(row, rows, best, budget) for row in rows)]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in each) + " |" for each in found]
    return "\n".join([*table, "", *(f"* {line}" for line in lines)]) + "\n"


def rows_as_json(rows: Sequence[Treated], best: Treated, budget: Budget) -> dict[str, Any]:
    """The content of heal.json."""
    return {
        "best": best.method,
        "rule": RULE,
        "budget": budget._asdict(),
        "rows": [
            {
                "method": row.method, "seconds": row.seconds, "change": row.change, "left_out": row.why,
                "figures": {n: {"k": s.k, "n": s.n, "percent": s.percent} for n, s in (row.figures or {}).items()},
            }
            for row in rows
        ],
    }  # fmt: skip


def summary(best: Treated, rows: Sequence[Treated]) -> str:
    """What came out, in one sentence."""
    untreated = rows[0].figures
    assert untreated is not None and best.figures is not None
    before, after = untreated["hs"], best.figures["hs"]
    if best is rows[0]:
        return (
            f"Nothing within the budget has at least two harmful answers fewer than the model as it came ({before.k} of {before.n}), so "
            "that is left as it is."
        )
    return f"Best within the budget: {best.method}, harmful answers {before.k} → {after.k} of {after.n}."


def lines_below(best: Treated, rows: Sequence[Treated], data: str) -> list[str]:
    """What has to be known to read the table; ``data``: which methods the data allows."""
    return [summary(best, rows), data, NOTE, RULE]
