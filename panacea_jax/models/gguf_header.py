"""Whether the header of a GGUF file is what it says, before the ``gguf`` package reads it: that believes every count and goes through
as many elements, which a few bytes can make years.

Layout, little endian: magic, version, counts of tensors and keys; keys with a type and a value; tensors with name, shape, type and
offset (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
import mmap
import struct
from pathlib import Path

from panacea_jax.untrusted import MIB, opened, parsing

MAGIC, VERSIONS = b"GGUF", (2, 3)
# Bytes of numbers by their type; the others are strings and arrays.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
# Far above every file that there is: bytes of the header and of one text, of a token or a merge, elements of an array, axes.
MOST_HEADER, MOST_TEXT, MOST_TOKEN, MOST_ELEMENTS, MOST_AXES = 256 * MIB, 16 * MIB, 2048, 2**22, 4


def check_header(file: Path) -> None:
    """Walk the header by its own counts and see that all of it is there.

    Raises:
        InputError: it is not, or is larger than any.
    """
    where, problem = f"--gguf={file}", "damaged or not a GGUF file"
    with opened(file, where) as stream, parsing(where, problem), mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(data)
        if walk.take(4) != MAGIC or walk.number("I") not in VERSIONS:
            raise ValueError("no magic and version 2 or 3")
        tensors, keys = walk.number("Q"), walk.number("Q")
        if tensors > MOST_ELEMENTS or keys > MOST_ELEMENTS:
            raise ValueError(f"{tensors} tensors and {keys} keys")
        for _ in range(keys):
            walk.text(MOST_TOKEN)
            walk.value(walk.number("I"))
        for _ in range(tensors):
            walk.text(MOST_TOKEN)
            walk.shape()
            walk.take(4 + 8)


class _Walk:
    """A place in the header that only moves within it."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._end = data, 0, min(len(data), MOST_HEADER)

    def take(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > self._end:
            raise ValueError(f"the header is cut off at byte {start}, or too large")
        return self._data[start : self._at]

    def number(self, kind: str) -> int:
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0])

    def text(self, most: int) -> None:
        length = self.number("Q")
        if length > most:
            raise ValueError(f"a text of {length} bytes at byte {self._at}")
        self.take(length).decode("utf-8")

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.text(MOST_TEXT)
        elif kind == ARRAY:
            inner, length = self.number("I"), self.number("Q")
            if length > MOST_ELEMENTS:
                raise ValueError(f"an array of {length} elements at byte {self._at}")
            if inner == STRING:
                for _ in range(length):
                    self.text(MOST_TOKEN)
            else:
                self.take(self._size(inner) * length)
        else:
            self.take(self._size(kind))

    def shape(self) -> None:
        axes = self.number("I")
        if axes > MOST_AXES or math.prod(self.number("Q") for _ in range(axes)) > 2**48:
            raise ValueError(f"a tensor larger than any at byte {self._at}")

    def _size(self, kind: int) -> int:
        if kind not in SIZES:
            raise ValueError(f"type {kind} at byte {self._at}")
        return SIZES[kind]
