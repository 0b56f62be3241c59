"""Stacks of defences written in a line, as a comparison lists its methods: ``"vaccine:rho=2+panacea:rho=0.25,lam=0.2"``.

Parts are joined by ``+``; each is a name of ``DEFENCES`` with hyper-parameters and goes to its own stage. ``sft`` stands for the stages
that are not named. In a grid a value may have alternatives, ``"panacea:rho=0.1|0.25,lam=0.2"``.
"""

import ast
import dataclasses
import itertools
import re
from typing import Any, NamedTuple

from panacea_jax.defences import DEFENCES, Sft
from panacea_jax.defences.protocol import hyper_parameters
from panacea_jax.errors import InputError


class Part(NamedTuple):
    """One defence and the hyper-parameters that differ from its defaults, in the method's own order."""

    name: str
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        settings = ",".join(f"{key}={value}" for key, value in self.settings)
        return f"{self.name}:{settings}" if settings else self.name


@dataclasses.dataclass(frozen=True)
class Stack:
    """A defence for each stage that has one of its own; None: plain SFT, or for ``heal`` nothing."""

    align: Part | None = None
    finetune: Part | None = None
    heal: Part | None = None

    def __str__(self) -> str:
        """The same whatever the order it was written in."""
        named = [part for part in (self.align, self.finetune, self.heal) if part]
        return "+".join(map(str, named)) or "sft"


def slug(part: object) -> str:
    """A folder's name for a method or a part of one."""
    return re.sub(r"[^\w.=+-]+", "_", str(part))


def parse_stack(text: str, key: str) -> Stack:
    """One stack without alternatives.

    Args:
        text: as in the module's docstring.
        key: where it stands, for the error.

    Raises:
        InputError: not of that form, an unknown name or hyper-parameter, two defences for one stage, or alternatives.
    """
    found = candidates(text, key)
    if len(found) > 1:
        raise _error(key, text, "alternatives with | belong into config.compare.grid")
    return found[0]


def candidates(text: str, key: str) -> list[Stack]:
    """Every combination of the alternatives of a grid's entry.

    Raises:
        InputError: as :func:`parse_stack`.
    """
    # A + within a value, of a number or of a folder, has no method's name behind it.
    parts = [_parts(part, text, key) for part in re.split(r"\+(?=\s*[a-z_]+\s*(?:[:+]|$))", text)]
    found = [_stack(chosen, text, key) for chosen in itertools.product(*parts)]
    return list(dict.fromkeys(found))


def _parts(part: str, text: str, key: str) -> list[Part]:
    """The alternatives of one part."""
    name, colon, rest = part.strip().partition(":")
    if name not in DEFENCES:
        raise _error(key, text, f"{name!r} is no defence; known are {', '.join(DEFENCES)}")
    known = list(hyper_parameters(DEFENCES[name]))
    values: dict[str, list[Any]] = {}
    # Commas within brackets belong to a value, such as one radius a layer.
    for setting in re.split(r",(?![^(]*\))", rest) if colon else ():
        word, equals, written = (s.strip() for s in setting.partition("="))
        if not equals or not written:
            raise _error(key, text, f"{setting!r} is not KEY=VALUE")
        if word not in known:
            raise _error(key, text, f"{name} has no {word!r}; it has {', '.join(known) or 'none'}")
        if word in values:
            raise _error(key, text, f"{word} is there twice")
        values[word] = [_value(alternative) for alternative in written.split("|")]
    named = [word for word in known if word in values]
    return [
        Part(name, tuple(zip(named, v))) for v in itertools.product(*(values[w] for w in named))
    ]


def _stack(parts: tuple[Part, ...], text: str, key: str) -> Stack:
    stages: dict[str, Part] = {}
    for part in parts:
        kind = DEFENCES[part.name]
        if kind is Sft:
            continue
        if kind.stage in stages:
            raise _error(
                key,
                text,
                f"{stages[kind.stage].name} and {part.name} both act at the stage {kind.stage}",
            )
        stages[kind.stage] = part
    return Stack(**stages)


def _value(written: str) -> Any:
    """A Python literal, or the text as it stands."""
    try:
        return ast.literal_eval(written.strip())
    except (ValueError, SyntaxError):
        return written.strip()


def _error(key: str, text: str, why: str) -> InputError:
    return InputError(f"{key}: {text!r}: {why}")
