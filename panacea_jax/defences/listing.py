"""The command ``defences``: what is known of each method without running it, from its ``facts``."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from panacea_jax.defences import DEFENCES, Sft

STAGES = ("align", "finetune", "heal")


def stages(kind: type[Any]) -> tuple[str, ...]:
    """The stages that a method can act at: its own; plain SFT also aligns."""
    return ("align", "finetune") if kind is Sft else (kind.stage,)


def passes(kind: type[Any]) -> str:
    """Passes a step, in all and by stream: ``"3 (user 1, harmful 2)"``; ``"none"`` for a method without steps."""
    by_stream = {stream: n for stream, n in kind.facts.passes.items() if n}
    if not by_stream:
        return "none"
    parts = ", ".join(f"{stream} {n:.3g}" for stream, n in by_stream.items())
    return f"{sum(by_stream.values()):.3g} ({parts})"


def rows() -> list[tuple[str, ...]]:
    """A row a method, in the order of the pipeline."""
    found: list[tuple[str, ...]] = []
    for name, kind in sorted(DEFENCES.items(), key=lambda item: STAGES.index(stages(item[1])[0])):
        facts = kind.facts
        extra = ", ".join(kind().streams) or "none"
        found.append((name, facts.title, ", ".join(stages(kind)), extra, passes(kind), facts.memory, facts.paper,
                      facts.code))  # fmt: skip
    return found


def print_defences() -> None:
    """Print the table of all methods."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(title="passes: forward + backward passes a step, SFT = 1; a forward pass alone counts 1/2 (LoRA)",
                  title_justify="left", show_lines=True)  # fmt: skip
    for column in ("name", "method", "stage", "extra data", "passes", "extra memory", "paper", "public code"):  # fmt: skip
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in rows():
        table.add_row(*map(escape, row))
    console.print(table)
