"""The one guard before every parser: files of strangers are read within bounds, and whatever a parser stumbles over is one clear line.

A file that is too long, too deep or no file at all is refused before its content is held; an error of a parser, recursion, overflow
and memory among them, becomes an ``InputError`` that names the file. What is believed of such files and what is not: docs/untrusted.md.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from panacea_jax.errors import InputError

MIB = 2**20
# Bytes of a file that is held whole and of which people write no larger ones: settings, indexes, tables of results.
WHOLE = 64 * MIB
# Bytes or characters of one text: a book has two million, and its tokens take a hundred times the memory.
TEXT = 8 * MIB
# Levels of JSON: more are an attack on whatever walks them later, by recursion.
DEPTH = 64
# Seconds for an expression and a name of a module.
SECONDS = 1.0
# What parsers raise over content. A missing key, a wrong type and a number that is none are content here too.
_STUMBLES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError, RecursionError, MemoryError)


def reason(error: BaseException) -> str:
    """The first line of an error, without the path that OSError repeats."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "more than the memory holds"
    if isinstance(error, KeyError):
        return f"no {error}"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text.strip().split("\n")[0][:200] or type(error).__name__


@contextlib.contextmanager
def parsing(where: object, problem: str) -> Iterator[None]:
    """Whatever parsing in this block stumbles over is "WHERE: PROBLEM (REASON)".

    Raises:
        InputError: the parser failed, or the file cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({reason(error)})") from error
    except _STUMBLES as error:
        raise InputError(f"{where}: {problem} ({reason(error)})") from error


@contextlib.contextmanager
def opened(path: Path, where: object = None) -> Iterator[BufferedReader]:
    """A regular file, for reading. A pipe or a device, on which reading may not end, is none.

    Args:
        path: of the file.
        where: what errors call it; by default its path.

    Raises:
        InputError: it cannot be opened, or a read in the block fails.
    """
    where = path if where is None else where
    with parsing(where, "cannot be read"):
        kind = os.stat(path).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # a folder has a clear error of its own
            raise InputError(f"{where}: cannot be read (not a regular file)")
        with open(path, "rb") as stream:
            yield stream


def read_bounded(path: Path, most: int = WHOLE) -> bytes:
    """All bytes of a file of at most ``most``.

    Raises:
        InputError: it cannot be read, or has more.
    """
    with opened(path) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise InputError(f"{path}: has more than {most // MIB} MiB, which no such file has")
    return data


def parse_json(text: str | bytes, where: object, problem: str = "not JSON", *, strict: bool = False) -> Any:
    """A JSON value of at most ``DEPTH`` levels.

    Args:
        text: UTF-8 where it is bytes; its length is the caller's to bound.
        where: file or place, for the error.
        problem: what is wrong where it cannot be parsed.
        strict: refuse a key that is there twice, and NaN and Infinity.

    Raises:
        InputError: none of these.
    """
    hooks: dict[str, Any] = {"object_pairs_hook": _each_once, "parse_constant": _no_number} if strict else {}
    with parsing(where, problem):
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, **hooks)
        if text.count("{") + text.count("[") > DEPTH and _deeper(value):
            raise RecursionError
    return value


def read_json_value(path: Path, problem: str = "not readable as JSON", *, strict: bool = False) -> Any:
    """What a file of JSON holds.

    Raises:
        InputError: it cannot be read, is larger than ``WHOLE``, or is not JSON as :func:`parse_json` takes it.
    """
    return parse_json(read_bounded(path), path, problem, strict=strict)


def read_object(path: Path, problem: str = "not readable as JSON", *, strict: bool = False) -> dict[str, Any]:
    """The object that a file of JSON holds.

    Raises:
        InputError: as :func:`read_json_value`, or it holds something else.
    """
    parsed = read_json_value(path, problem, strict=strict)
    if not isinstance(parsed, dict):
        raise InputError(f"{path}: not a JSON object")
    return parsed


def parse_yaml(text: bytes, where: object) -> Any:
    """A YAML value of plain kinds; aliases, whose expansion has no bound, and keys that are there twice are refused.

    Raises:
        InputError: it is none.
    """
    import yaml

    class Plain(yaml.SafeLoader):
        """Objects, lists, texts and numbers alone."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("an alias (*name)")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            return _each_once([(self.construct_object(k, True), self.construct_object(v, True)) for k, v in node.value])

    with parsing(where, "not YAML"):
        try:
            return yaml.load(text.decode("utf-8-sig"), Plain)
        except yaml.YAMLError as error:
            place = getattr(error, "problem_mark", None)
            said = f"{getattr(error, 'problem', None) or type(error).__name__}{f', line {place.line + 1}' if place else ''}"
            raise ValueError(said) from error


def match_pattern(pattern: str, text: str, where: object, *, whole: bool = False) -> Any:
    """``re.match`` (``whole``: ``re.fullmatch``) of a pattern that a stranger wrote, which may take ``SECONDS``: some take years over a
    short name.

    Raises:
        InputError: it takes longer.
    """
    import regex

    try:
        return (regex.fullmatch if whole else regex.match)(pattern, text, timeout=SECONDS)
    except TimeoutError as error:
        raise InputError(f"{where}: the expression {pattern!r:.80} takes too long to match") from error
    except regex.error as error:
        raise InputError(f"{where}: {pattern!r:.80} is no expression ({error})") from error


def _each_once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {str(key)[:40]!r} is there twice")
        found[key] = value
    return found


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _deeper(value: Any) -> bool:
    """Whether there are more than ``DEPTH`` levels; without recursion."""
    level = [value]
    for _ in range(DEPTH):
        level = [inner for held in level for inner in _held(held)]
    return bool(level)


def _held(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
