"""The metadata of a GGUF file: typed access to its keys."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from panacea_jax.errors import InputError
from panacea_jax.models.reader import LARGEST


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Keys and values of a GGUF file.

    Attributes:
        file: where they come from.
        architecture: llama.cpp's name of the family, which its keys begin with.
        fields: fields of the ``gguf`` package by key.
    """

    file: Path
    architecture: str
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, reader: Any, file: Path) -> "Metadata":
        """Of an opened file.

        Raises:
            InputError: the file names no architecture.
        """
        name = reader.fields.get("general.architecture")
        if name is None:
            raise InputError(f"{file}: general.architecture is missing")
        return cls(file, str(name.contents()), reader.fields)

    def value(self, key: str) -> Any:
        """The value of a whole key, None where there is none."""
        return self.fields[key].contents() if key in self.fields else None

    def get(self, key: str) -> Any:
        """The value of a key of the architecture, None where there is none."""
        return self.value(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None, *, most: int = LARGEST) -> int:
        """A positive integer of the architecture's keys, of at most ``most``.

        Raises:
            InputError: missing without a default, or something else.
        """
        found = self.get(key)
        value = default if found is None else found
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            what = "is missing" if found is None else f"= {str(found)[:40]}: must be a positive integer"
            raise InputError(f"{self.file}: {self.architecture}.{key} {what}")
        return value

    def number(self, key: str, default: float) -> float:
        """A number of the architecture's keys, as short as float32 can be written: 1e-5, not 9.999999747378752e-06.

        Raises:
            InputError: something else.
        """
        found = self.get(key)
        if found is None:
            return default
        if not isinstance(found, int | float) or isinstance(found, bool) or not abs(found) < 1e38:
            raise InputError(f"{self.file}: {self.architecture}.{key} = {str(found)[:40]}: must be a number")
        return float(str(np.float32(found)))

    def token_id(self, name: str) -> int | None:
        """The id of a special token, e.g. "bos"; None where the file names none."""
        found = self.value(f"tokenizer.ggml.{name}_token_id")
        return None if found is None else int(found)

    def end_ids(self) -> list[int]:
        """Ids that end an answer: of the text, of a turn, of a message."""
        found = (self.token_id(name) for name in ("eos", "eot", "eom"))
        return list(dict.fromkeys(i for i in found if i is not None))
