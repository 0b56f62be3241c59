"""The section ``defence``: the hyper-parameters of every method, and the method that a section describes."""

import ast
import dataclasses
from abc import ABC
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import FieldReference

from panacea_jax.defences import DEFENCES, Method
from panacea_jax.defences.protocol import hyper_parameters
from panacea_jax.defences.spec import Part
from panacea_jax.errors import InputError


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """Raises:
    InputError: not ``ok``; says key, value and rule.
    """
    if not ok:
        raise InputError(f"config.{key} = {value!r:.200}: {rule}")


def one_of(value: str, key: str, choices: tuple[str, ...]) -> None:
    """Raises:
    InputError: the value is none of ``choices``.
    """
    require(value in choices, key, value, f"one of {', '.join(choices)}")


class NumberOrWord(ABC):  # noqa: B024
    """The type of a key that takes a number, a word or several numbers, as the methods that have it say (ρ: 0.25, "auto")."""


class _NumberOrWordParser(flags.ArgumentParser[Any]):
    """``0.25``, ``auto``, ``(0.1,0.2)``; numbers are floats, as in keys that take nothing else."""

    syntactic_help = "a number, a word or (several,numbers)"

    def parse(self, argument: Any) -> Any:
        """The value written."""
        try:
            value = ast.literal_eval(argument) if isinstance(argument, str) else argument
        except (SyntaxError, ValueError):
            return argument
        return as_number_or_word(value)


for _kind in (float, int, str, tuple):
    NumberOrWord.register(_kind)
config_flags.register_flag_parser_for_type(NumberOrWord, _NumberOrWordParser())


def as_number_or_word(value: Any) -> Any:
    """A whole number as a float, several numbers as a tuple of floats: what was written and what was read again are the same."""
    if isinstance(value, (list, tuple)):
        return tuple(map(as_number_or_word, value))
    return float(value) if type(value) is int else value


class _Lookup(NamedTuple):
    """An operation of a ``FieldReference``: ``fn(value, *args)``, with references among ``args`` resolved."""

    fn: Callable[..., Any]
    args: tuple[FieldReference | str, ...]


def _own_default(_: Any, name: str, key: str) -> Any:
    return method_defaults(name).get(key)


def defence_defaults(name: str) -> ConfigDict:
    """Every hyper-parameter of every method. One that is not set is the named method's own default, or None where it has no such key."""
    chosen = FieldReference(name)
    section = ConfigDict({"name": chosen})
    for key, kind in all_hyper_parameters().items():
        # The value only gives the type: what is read is what the lookup returns, until the key is set.
        section[key] = FieldReference(
            "" if kind is NumberOrWord else kind(), kind, op=_Lookup(_own_default, (chosen, key))
        )
    return section


def all_hyper_parameters() -> dict[str, type]:
    """Keys of ``config.defence`` beside ``name``, over all methods, with the type that ml_collections checks."""
    found: dict[str, type] = {}
    for kind_of_defence in DEFENCES.values():
        for name, hint in _types(kind_of_defence).items():
            kind = _kind_of(hint)
            known = found.setdefault(name, kind)
            if known is not kind:
                if {known, kind} != {float, NumberOrWord}:
                    raise TypeError(f"defence.{name}: two methods disagree about its type")
                found[name] = NumberOrWord
    return found


def _types(kind: Any) -> dict[str, Any]:
    """The hyper-parameters of a method and their type hints, in its own order."""
    hints = {field.name: field.type for field in dataclasses.fields(kind)}
    return {name: hints[name] for name in hyper_parameters(kind)}


def _hints(hint: Any) -> set[type]:
    """The types that a hyper-parameter may have: of ``float | int``, of ``tuple[float, ...]``."""
    several = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return {get_origin(h) or h for h in several}


def _kind_of(hint: Any) -> type:
    """The one type that ml_collections is told of it."""
    if get_origin(hint) is Literal:
        return str
    hints = _hints(hint)
    if str in hints:
        return NumberOrWord if hints & {float, tuple} else str
    return next(t for t in (float, int, bool, tuple) if t in hints)


def _in_words(hint: Any) -> str:
    """What a :class:`NumberOrWord` may be: "a number, a word or several numbers"."""
    hints = _hints(hint)
    words = {float: "a number", str: "a word", tuple: "several numbers"}
    return " or ".join(text for kind, text in words.items() if kind in hints)


def in_one_form(section: Mapping[str, Any]) -> dict[str, Any]:
    """A ``defence`` section whose numbers are written in one way: ρ = 1 and ρ = 1.0 are one setting."""
    kinds = all_hyper_parameters()
    return {k: as_number_or_word(v) if kinds.get(k) is NumberOrWord else v for k, v in section.items()}


def method_defaults(name: str) -> dict[str, Any]:
    """The hyper-parameters of one method; empty for a name that is none."""
    return hyper_parameters(DEFENCES[name]) if name in DEFENCES else {}


def defence_section(part: Part) -> ConfigDict:
    """``config.defence`` for a defence written in a line.

    Raises:
        InputError: a value of the wrong type.
    """
    section = defence_defaults(part.name)
    for name, value in part.settings:
        try:
            section[name] = as_number_or_word(value) if all_hyper_parameters()[name] is NumberOrWord else value
        except (TypeError, ValueError) as error:
            raise InputError(f"config.defence.{name} = {value!r}: {error}") from error
    return section.lock()


def part_of(section: ConfigDict) -> Part:
    """The line that describes a ``defence`` section: what ``defence_section`` makes it of."""
    own = method_defaults(section.name).items()
    return Part(section.name, tuple((key, section[key]) for key, default in own if section[key] != default))


def make_defence(section: ConfigDict, prefix: str = "") -> Method:
    """The defence of a ``defence`` section: of its keys, those that the method has.

    Raises:
        InputError: unknown name, or an impossible hyper-parameter.
    """
    if section.name not in DEFENCES:
        raise InputError(
            f"config.{prefix}defence.name = {section.name!r}: unknown; known are {', '.join(DEFENCES)}"
        )
    refuse_foreign_keys(section, prefix)
    kind: Any = DEFENCES[section.name]
    types = _types(kind)
    chosen = {key: section[key] for key in types}
    for key, hint in types.items():
        if get_origin(hint) is Literal:
            one_of(chosen[key], f"{prefix}defence.{key}", get_args(hint))
        elif all_hyper_parameters()[key] is NumberOrWord:
            fits = type(as_number_or_word(chosen[key])) in _hints(hint)
            require(fits, f"{prefix}defence.{key}", chosen[key], f"{section.name} takes {_in_words(hint)} here")  # fmt: skip
    try:
        return kind(**chosen)
    except InputError as error:  # the method does not know where its section stands
        raise InputError(
            str(error).replace("config.defence.", f"config.{prefix}defence.")
        ) from error


def refuse_foreign_keys(section: ConfigDict, prefix: str = "") -> None:
    """Check that no hyper-parameter is set which the named method does not have: it would be ignored, or mean another thing.

    Raises:
        InputError: one is; its key is named.
    """
    known = method_defaults(section.name)
    for key in all_hyper_parameters():
        # Unset, a key of another method is None.
        if key not in known and section[key] is not None:
            has = f"it has {', '.join(known)}" if known else "it has none"
            whose = f"{section.name} has no {key}; {has}" if section.name else f"config.{prefix}defence.name is not set"  # fmt: skip
            raise InputError(f"config.{prefix}defence.{key} = {section[key]!r:.200}: {whose}")
