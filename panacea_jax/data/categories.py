"""The 14 harm categories of BeaverTails, in one spelling whatever form a file has them in, and choosing records by category.

Names and order are those of the published set and of the classifier trained on it.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from panacea_jax.data.fields import named_fields, names_beyond
from panacea_jax.errors import InputError

CATEGORIES = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)

_ANY_NAME = re.compile("|".join(map(re.escape, CATEGORIES)))


def normalise(value: Any) -> list[str]:
    """The names of a record's categories, the 14 in their order, then names of other taxonomies.

    Args:
        value: None, a mapping name → bool (the hub's form), a list of names, one name, several
            names in one text (they hold commas themselves), or one of these forms as JSON or as
            Python prints it (a CSV cell).

    Raises:
        InputError: Of another type, or a mapping to something that is not a boolean.
    """
    names = _names(_parsed(value))
    known = [name for name in CATEGORIES if name in names]
    return known + [name for name in dict.fromkeys(names) if name not in CATEGORIES]


def _parsed(value: Any) -> Any:
    """A CSV cell that holds a mapping or a list, read; anything else as it is."""
    if not isinstance(value, str) or not value.strip().startswith(("{", "[")):
        return value
    for read in (json.loads, ast.literal_eval):  # neither can run code
        try:
            return read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    raise InputError("field 'category': neither JSON nor a list of names", record=value)


def _names(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        spelled = re.sub(r"[ -]", "_", value.strip().lower())
        found = _ANY_NAME.findall(spelled)
        if found and not re.sub(r"[,;|_]", "", _ANY_NAME.sub("", spelled)):
            return found
        return [value.strip()] if value.strip() else []
    if isinstance(value, Mapping) and all(flag in (True, False, None) for flag in value.values()):
        return [name for key, flag in value.items() if flag for name in _names(key)]
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return [name for part in value for name in _names(part)]
    raise InputError("field 'category': expected names, or booleans by name", record=value)


class Selection(NamedTuple):
    """Which categories of a set are taken, ``only=NAME+NAME``, or left out, ``not=NAME+NAME``.

    The two of the same names share no record and leave none that has a category; those without one are taken by neither.

    Attributes:
        names: of the categories; of a name with commas its beginning will do.
        keep: whether records of any of them are the ones that are taken, or those that are not.
    """

    names: tuple[str, ...]
    keep: bool

    @classmethod
    def parse(cls, text: str) -> "Selection":
        """What stands behind a task.

        Raises:
            InputError: of another form.
        """
        word, _, names = text.partition("=")
        found = tuple(name.strip() for name in names.split("+"))
        if word not in ("only", "not") or not all(found):
            raise InputError(f"{text!r}: write only=NAME+NAME or not=NAME+NAME")
        return cls(found, word == "only")

    @property
    def label(self) -> str:
        """For names of files."""
        return "-".join(("only" if self.keep else "not", *self.names))

    def of(self, found: Sequence[Sequence[str]], where: str) -> list[bool]:
        """Of records by their categories, which are taken.

        Raises:
            InputError: a name that no record has, or nothing that is taken.
        """
        known = dict.fromkeys(name for names in found for name in names)
        for name in self.names:
            if not any(map(_is(name), known)):
                others = names_beyond(known, CATEGORIES)
                raise InputError(f"{where}: no record of category {name!r}; it has {named_fields(known, CATEGORIES, '; ')}", record=others)
        tests = [_is(name) for name in self.names]
        taken = [
            bool(names) and any(test(n) for test in tests for n in names) == self.keep
            for names in found
        ]
        if not any(taken):
            raise InputError(f"{where}: {self.label} leaves no record")
        return taken


def _is(written: str) -> Callable[[str], bool]:
    """Whether a category is the one that is written, in full or up to one of its commas."""
    return lambda name: f"{name},".startswith(f"{written},")
