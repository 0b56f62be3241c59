"""What ``doctor`` prints: tables, and the problems in the order in which they were found."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from panacea_jax.data import files
from panacea_jax.errors import InputError

PLAIN_WIDTH = 160  # columns, where there is no terminal to ask
NOT_LOOKED_AT = "hub id; not looked at"


class Report:
    """Tables on stdout, and the problems in the order in which they were found."""

    def __init__(self) -> None:
        terminal = sys.stdout.isatty()
        self._console = Console(
            width=None if terminal else PLAIN_WIDTH, markup=False, highlight=False, emoji=False
        )
        self._box = box.SIMPLE_HEAD if terminal else None
        self.problems: list[str] = []

    def table(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print one table; numbers (a head that begins with "#") are set to the right."""
        table = Table(box=self._box, pad_edge=False, show_header=any(heads))
        for head in heads:
            right = head.startswith("#")
            table.add_column(
                head.removeprefix("#"), justify="right" if right else "left", overflow="fold"
            )
        for row in rows:
            table.add_row(*row)
        self._console.print(f"\n{title}", style="bold")
        self._console.print(table)

    def line(self, text: str) -> None:
        """Print one line."""
        self._console.print(text)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Keep an InputError of the block for the end, and go on after it."""
        try:
            yield
        except InputError as error:
            if str(error) not in self.problems:  # one cause may show in several tables
                self.problems.append(str(error))

    def end(self) -> None:
        """Raise the first problem, if there is any."""
        if not self.problems:
            self.line("\nno problem found")
            return
        self.table("problems", ("",), [(problem,) for problem in self.problems])
        raise InputError(self.problems[0])


def mib(n: int) -> str:
    """Bytes, to be read."""
    return f"{n / 2**20:,.2f} MiB"


def gib(n: int | None) -> str:
    """Likewise many; of None that it is not known."""
    return "not said" if n is None else f"{n / 2**30:,.1f} GiB"


def model_folder(path: str) -> Path | None:
    """The local model folder, None for a hub id; InputError for a path that is not there."""
    try:
        return files.local(path)
    except InputError as error:
        raise InputError(f"config.model.path: {error}") from error
