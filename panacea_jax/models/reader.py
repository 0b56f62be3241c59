"""Typed access to the keys of a ``config.json``, with errors that name file and key."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from panacea_jax.errors import InputError

# No size of a decoder is larger; what is made from sizes before the tensors are seen stays small.
LARGEST = 2**31 - 1
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclasses.dataclass(frozen=True)
class Reader:
    """Typed access to the keys of one ``config.json``; null counts as absent unless a method says
    otherwise.

    Attributes:
        d: the parsed object.
        where: what errors begin with: the file, and the key of an object within it.
    """

    d: Mapping[str, Any]
    where: str

    def fail(self, key: str, problem: str) -> InputError:
        """The error to raise about the value of a key."""
        return InputError(f"{self.where}: {key} = {self.d.get(key)!r:.80}: {problem}")

    def inner(self, key: str) -> "Reader":
        """The object under a key; an empty one where there is none."""
        given = self.d.get(key) or {}
        if not isinstance(given, dict):
            raise self.fail(key, "must be an object")
        return Reader(given, f"{self.where}: {key}")

    def changed(self, **values: Any) -> "Reader":
        """The same with other values of some keys."""
        return Reader({**self.d, **values}, self.where)

    def integer(self, key: str, default: int | None = None, *, most: int = LARGEST) -> int:
        """A positive integer of at most ``most``; required where there is no default."""
        value = self.d.get(key)
        if value is None:
            if default is None:
                raise InputError(f"{self.where}: {key} is missing")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fail(key, "must be a positive integer")
        if value > most:
            raise self.fail(key, f"no model has more than {most}")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.d.get(key)
        return default if value is None else self._positive(key, value)

    def nullable(self, key: str, default: float | None) -> float | None:
        """A number where an explicit null means "none", unlike an absent key."""
        value = self.d.get(key, default)
        return None if value is None else self._positive(key, value)

    def _positive(self, key: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise self.fail(key, "must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.d.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, "must be true or false")
        return default if value is None else value

    def activation(self, key: str, default: str) -> str:
        """An activation by our name for it."""
        name = self.d.get(key) or default
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise self.fail(key, f"unsupported; one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def layer_types(self, default: list[str]) -> list[str]:
        """``layer_types``, checked: one of the two known words for each layer."""
        types = self.d.get("layer_types")
        if types is None:
            return default
        if not isinstance(types, list) or len(types) != len(default):
            raise self.fail("layer_types", f"must list {len(default)} layers")
        if not {str(kind) for kind in types} <= {"full_attention", "sliding_attention"}:
            raise self.fail("layer_types", "knows full_attention and sliding_attention only")
        return types
