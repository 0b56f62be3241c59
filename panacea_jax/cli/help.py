"""What ``--help``, ``--helpfull`` and ``--version`` print."""

import shutil
import textwrap

from panacea_jax.cli.commands import COMMANDS
from panacea_jax.cli.flags import FLAGS, PROCESS_FLAGS
from panacea_jax.cli.keys import Key, key_table

HELP, HELPFULL, VERSION = ("-h", "--help"), ("--helpfull",), ("--version",)

# Where no terminal says how wide it is, as in a file or a pager.
_COLUMNS = 140
# A key and its default; what it means stands to the right.
_KEY_WIDTH = 36


def version() -> str:
    """Of this package."""
    import importlib.metadata  # which takes longer than all the rest

    return f"panacea_jax {importlib.metadata.version('panacea_jax')}"


def usage(full: bool = False) -> str:
    """Of ``panacea`` without a command: all of them, and with ``full`` every key."""
    lines = [
        "usage: panacea <command> [--config=RECIPE[:variant]] [--config.KEY=VALUE …] [--workdir=DIR]",
        "",
        "commands:",
    ]
    lines += [f"  {name:<11} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "panacea <command> --help shows the command's flags and the config keys that it reads; panacea --version."]
    if full:
        lines += ["", "config keys:", *_key_lines(key_table(), full)]
    return "\n".join(lines)


def command_help(name: str, full: bool = False) -> str:
    """Of one command: its flags and the keys that it reads, each in a line; with ``full`` in all words, and the other keys too."""
    command = COMMANDS[name]
    lines = [f"panacea {name}: {command.summary}", ""]
    lines += ["flags:"] if command.reads or command.flags else []
    if command.reads:
        lines.append("  --config=RECIPE[:variant]  a file, or the name of one that comes with the package; without it the defaults")
    for flag in command.flags:
        text, default = FLAGS[flag]
        lines.append(f"  --{flag}={'…' if default in ('', []) else str(default).lower()}  {text}")
    if command.several:
        lines += ["", "as one of several processes (docs/processes.md):"]
        lines += [f"  --{flag}=…  {text}" for flag, text in PROCESS_FLAGS.items()]
    keys = key_table()
    if read := [key for key in keys if key.within(command.reads)]:
        lines += ["", f"config keys that {name} reads (--config.KEY=VALUE):", *_key_lines(read, full)]
    if full and (others := [key for key in keys if key not in read]):
        lines += ["", "config keys of other commands:", *_key_lines(others, full)]
    lines += ["", "(P) as Panacea's published scripts have it, (A) as usual for AdamW."] if read or full else []
    lines += ["", f"panacea {name} --helpfull explains every key in full."] if read and not full else []
    return "\n".join(lines)


def _key_lines(keys: list[Key], full: bool) -> list[str]:
    columns = max(shutil.get_terminal_size((_COLUMNS, 24)).columns, _KEY_WIDTH + 40)
    lines = []
    for key in keys:
        head = f"  {', '.join(key.names) + ' = ' + key.default:<{_KEY_WIDTH}}  "
        text = key.meaning if full else textwrap.shorten(key.meaning, columns - len(head), placeholder=" …")
        lines += textwrap.wrap(
            text, columns, initial_indent=head, subsequent_indent=" " * (_KEY_WIDTH + 4), break_long_words=False, break_on_hyphens=False
        )  # fmt: skip
    return lines
