"""The configuration's keys as docs/configuration.md explains them: the one table of their meanings, which ``--help`` prints too.

Nothing of ``config`` is imported, which knows the methods and so JAX; a test holds the page to the configuration.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from panacea_jax.shipped import shipped

_NAME = r"`[a-z0-9_.]+`"
_ROW = re.compile(rf"^\| ({_NAME}(?:, {_NAME})*) \| (.+?) \| (.+) \|$", re.MULTILINE)
_LINK = re.compile(r"\[[^]]*\]\((\w+\.md)[^)]*\)")


class Key(NamedTuple):
    """A row of the table: a key, or several sections that repeat others; the default as Python writes it; what it means."""

    names: tuple[str, ...]
    default: str
    meaning: str

    def within(self, sections: Sequence[str]) -> bool:
        """Whether it is, or lies in, one of some keys and sections."""
        return any(name == s or name.startswith(f"{s}.") for name in self.names for s in sections)


def key_table() -> list[Key]:
    """Every row of docs/configuration.md, in its order, as plain text."""
    page = (shipped("docs", "docs") / "configuration.md").read_text("utf-8")
    return [
        Key(tuple(re.findall(r"[a-z0-9_.]+", names)), default, _plain(meaning))
        for names, default, meaning in _ROW.findall(page)
    ]


def _plain(markdown: str) -> str:
    return _LINK.sub(r"docs/\1", markdown).replace("`", "").replace(r"\|", "|")
