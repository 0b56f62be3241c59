"""What a command reads of its configuration, set beside what its ``--help`` says that it reads."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from panacea_jax import cli

PACKAGE = Path(cli.__file__).parents[1]
# Makes configurations itself and reads none that a user gave.
MAKES_ITS_OWN = ("quickstart",)


@contextlib.contextmanager
def only_what_help_names(name: str) -> Iterator[None]:
    """Fails where a command, once its configuration is valid, reads a key that is in none of the sections of its ``reads``."""
    command = cli.COMMANDS.get(name)
    if command is None or name in MAKES_ITS_OWN:
        yield
        return

    def run(values: Any, config: ConfigDict) -> Path | None:
        with _recorded() as found:
            path = command.run(values, config)
        missing = [k for k in sorted(found) if not any(_within(k, r) or _within(r, k) for r in command.reads)]
        assert not missing, f"`panacea {name}` reads {missing}: name them in COMMANDS[{name!r}].reads"
        return path

    cli.COMMANDS[name] = command._replace(run=run)
    try:
        yield
    finally:
        cli.COMMANDS[name] = command


def _within(path: str, section: str) -> bool:
    return path == section or path.startswith(f"{section}.")


@contextlib.contextmanager
def _recorded() -> Iterator[set[str]]:
    """Dotted keys and sections that the package's code asks a configuration for."""
    found: set[str] = set()
    sections: dict[int, tuple[str, ConfigDict]] = {}  # kept, so that no other gets its id
    plain = ConfigDict.__getitem__

    def read(self: ConfigDict, key: str):
        value = plain(self, key)
        whole = {"seed", "model", "compare"} <= self._fields.keys()
        if whole or id(self) in sections:
            path = key if whole else f"{sections[id(self)][0]}.{key}"
            if isinstance(value, ConfigDict):
                sections[id(value)] = path, value
            frame = sys._getframe(1)  # config["key"], or that of config.key; a copy or a dictionary of the whole asks from deeper down
            frame = frame.f_back if frame.f_code.co_name == "__getattr__" else frame
            file = Path(frame.f_code.co_filename)
            if PACKAGE in file.parents and file.parent.name != "config":
                found.add(path)
        return value

    ConfigDict.__getitem__ = read
    try:
        yield found
    finally:
        ConfigDict.__getitem__ = plain
