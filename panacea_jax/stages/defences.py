"""The command ``defences``: what is known of each method, at its own settings, without running it."""

from rich.markup import escape
from rich.table import Table

from panacea_jax.defences import DEFENCES, Method
from panacea_jax.defences.protocol import (
    STAGES,
    extra_data,
    passes_of,
    single_batches_of,
    whole_passes_of,
)
from panacea_jax.progress import table_console


def passes_text(defence: Method) -> str:
    """Passes a step, in all and by stream, and those over whole sets: ``"1 (user 1); once 1 over all alignment"``; ``"none"`` for a
    method that makes none."""
    by_stream = {stream: n for stream, n in passes_of(defence).items() if n}
    parts = ", ".join(f"{stream} {n:.3g}" for stream, n in by_stream.items())
    steps = [f"{sum(by_stream.values()):.4g} ({parts})"] if by_stream else []
    once = [f"once {n:.3g} over all {stream}" for stream, n in whole_passes_of(defence).items()]
    once += [f"once {n:.3g} batches of {stream}" for stream, n in single_batches_of(defence).items()]
    return "; ".join(steps + once) or "none"


def defence_rows() -> list[tuple[str, ...]]:
    """A row a method, in the order of the pipeline."""
    found: list[tuple[str, ...]] = []
    methods = {name: kind() for name, kind in DEFENCES.items()}
    for name, defence in sorted(methods.items(), key=lambda item: STAGES.index(item[1].stages[0])):
        facts = defence.facts
        extra = ", ".join(extra_data(defence)) or "none"
        found.append((name, facts.title, ", ".join(defence.stages), extra, passes_text(defence), facts.memory, facts.paper,
                      facts.code))  # fmt: skip
    return found


def print_defences() -> None:
    """Print the table of all methods."""
    console = table_console(200)
    table = Table(title="at the methods' own settings; passes: forward + backward passes a step, SFT = 1, and over whole sets; a forward "
                  "pass alone counts 1/2 (LoRA)",
                  title_justify="left", show_lines=True)  # fmt: skip
    for column in ("name", "method", "stage", "extra data", "passes", "extra memory", "paper", "public code"):  # fmt: skip
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in defence_rows():
        table.add_row(*map(escape, row))
    console.print(table)
