"""The safetensors container, read by byte range and written as a stream.

Format: eight bytes (length of the header, little endian), a JSON header ``{name: {"dtype", "shape",
"data_offsets"}}``, the bytes of the tensors. The safetensors package reads whole tensors for numpy;
a shard of a large matrix needs only some rows or columns, and a 16 GB model must not pass through
memory twice, hence these few lines. Files are read, not mapped: pages of a map count as the
process's memory until the kernel takes them back. Nothing here can run code from a file.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from panacea_jax.disk import check_room, replacing_file
from panacea_jax.errors import InputError
from panacea_jax.untrusted import MIB, opened, parse_json, parsing

STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
# What the header of a model says, or else transformers refuses it.
FORMAT: Mapping[str, str] = {"format": "pt"}
# Bytes of a header, and axes of a tensor: a hundred bytes a tensor, so of 160,000 of them.
MOST_HEADER, MOST_AXES = 16 * MIB, 8
# Bytes that are read at a time: what fits a cache is transposed twice as fast as 4 MiB.
BYTES_AT_A_TIME = 2**20
# Tile of a transposed copy: 2.4 times as fast as row by row on a matrix that does not fit the cache.
_TILE = 64


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        name: its name in the file.
        file: the file.
        dtype: element type as the file spells it, e.g. ``"BF16"``.
        shape: as stored.
        start: offset of its first byte in the file.
        stop: offset behind its last byte.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def element(self) -> np.dtype[Any]:
        """Element type.

        Raises:
            InputError: not a floating-point type that we load.
        """
        if self.dtype not in STORED_DTYPES:
            known = ", ".join(STORED_DTYPES)
            raise InputError(
                f"{self.file}: tensor {self.name} has type {self.dtype}; known: {known}"
            )
        return STORED_DTYPES[self.dtype]

    def head(self, count: int) -> bytes:
        """Its first ``count`` bytes, or all.

        Raises:
            InputError: as of :meth:`blocks`.
        """
        size = min(count, math.prod(self.shape) * self.element.itemsize)
        with self._opened() as stream:
            return self._read(stream, np.empty(size, np.uint8), self.start).tobytes()

    def blocks(self, bounds: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
        """The part of a vector or matrix within ``bounds``, some rows (:data:`BLOCK` bytes) after the others. No other bytes are read.

        Args:
            bounds: start and stop on each axis.

        Raises:
            InputError: the element type, a file that cannot be read or has become shorter.
        """
        dtype = self.element
        stride = math.prod(self.shape[1:]) * dtype.itemsize
        (first, last), *inner = bounds
        left, right = inner[0] if inner else (0, 1)
        width = right - left
        rows = max(1, BYTES_AT_A_TIME // max(1, width * dtype.itemsize))
        with self._opened() as stream:
            for row in range(first, last, rows):
                block = np.empty((min(rows, last - row), width), dtype)
                at = self.start + row * stride + left * dtype.itemsize
                if width * dtype.itemsize == stride:
                    self._read(stream, block, at)
                else:
                    for i, line in enumerate(block):
                        self._read(stream, line, at + i * stride)
                yield block if inner else block[:, 0]

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """A descriptor of the file."""
        try:
            with self.file.open("rb", buffering=0) as stream:
                yield stream.fileno()
        except OSError as error:
            raise InputError(
                f"{self.file}: tensor {self.name} cannot be read: {error.strerror}"
            ) from error

    def _read(self, stream: int, out: np.ndarray, at: int) -> np.ndarray:
        """Fill the contiguous ``out`` from the file."""
        left = out.reshape(-1).view(np.uint8).data
        while left:
            count = os.preadv(stream, [left], at)
            if not count:
                raise InputError(
                    f"{self.file}: truncated: tensor {self.name} lacks {len(left)} bytes"
                )
            left, at = left[count:], at + count
        return out


def read_header(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name.

    Raises:
        InputError: missing, damaged or truncated; names the file, and the tensor that is cut off.
    """
    problem = "damaged safetensors header"
    with opened(file) as stream:
        total = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if total < 8 or length > total - 8:
            raise InputError(f"{file}: truncated or not a safetensors file (header cut off)")
        if length > MOST_HEADER:
            raise InputError(f"{file}: {problem}: more than {MOST_HEADER // MIB} MiB")
        header = parse_json(stream.read(length), file, problem, strict=True)
    if not isinstance(header, dict):
        raise InputError(f"{file}: {problem}: not an object")
    header.pop("__metadata__", None)
    found = {name: _tensor(name, file, entry, 8 + length, total) for name, entry in header.items()}
    end = 0
    for tensor in sorted(found.values(), key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start < end:
            raise InputError(f"{file}: tensor {tensor.name}: shares bytes with another")
        end = tensor.stop
    return found


def _tensor(name: str, file: Path, entry: Any, data: int, total: int) -> Tensor:
    """One header entry, checked against the file's size."""
    with parsing(f"{file}: tensor {name}", "damaged header entry"):
        shape = tuple(_count(n) for n in entry["shape"])
        begin, end = (_count(n) for n in entry["data_offsets"])
        dtype = str(entry["dtype"])
        if len(shape) > MOST_AXES:
            raise ValueError(f"{len(shape)} axes")
    if data + end > total:
        missing = data + end - total
        raise InputError(f"{file}: truncated: tensor {name} lacks {missing} bytes")
    size = math.prod(shape) * STORED_DTYPES[dtype].itemsize if dtype in STORED_DTYPES else None
    if begin > end or size not in (None, end - begin):
        raise InputError(f"{file}: tensor {name}: {end - begin} bytes do not hold shape {shape}")
    return Tensor(name, file, dtype, shape, data + begin, data + end)


def _count(value: Any) -> int:
    """A number of a header: whole, not negative, and of 64 bits."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r:.40} is no count")
    return value


class Entry(NamedTuple):
    """A tensor to write. ``values()`` is called when its turn comes; a transposed or unconverted view will do."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    values: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def entries_of(arrays: Mapping[str, np.ndarray]) -> list[Entry]:
    """Arrays on the host as what is to be written."""
    return [Entry(name, array.shape, array.dtype, functools.partial(np.asarray, array)) for name, array in arrays.items()]


def write_tensors(
    file: Path,
    tensors: Iterable[Entry],
    metadata: Mapping[str, str] = FORMAT,
) -> None:
    """Write tensors one after the other, and ``metadata`` into the header. The file appears whole or not at all.

    Raises:
        InputError: a tensor that no arithmetic can use, see :func:`_check_usable`.
        OSError: there is no room for the file, or it cannot be written.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers expect the data to be aligned
    check_room(file.parent, 8 + len(encoded) + offset)
    with replacing_file(file) as new, new.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            values = tensor.values()
            if values.shape != tensor.shape:
                raise ValueError(f"{values.shape} given for a tensor declared as {tensor.shape}")
            rows = max(1, BYTES_AT_A_TIME * len(values) // max(1, tensor.size))
            for start in range(0, len(values), rows):
                part = values[start : start + rows]
                block = np.empty(part.shape, tensor.dtype)
                with np.errstate(over="ignore"):  # what does not fit becomes infinite
                    copy(block, part)
                _check_usable(block, tensor.name, file)
                stream.write(block.reshape(-1).view(np.uint8).data)


def _check_usable(block: np.ndarray, name: str, file: Path) -> None:
    """That rows of a tensor, as they are about to be written, are finite, and that in the arithmetic of models (float32, of float64
    itself) their norm is: with 3e38 in it every product overflows.

    Raises:
        InputError: they are not; says whether the numbers themselves or their norm.
    """
    flat = block.reshape(-1).astype(np.promote_types(block.dtype, np.float32), copy=False)
    with np.errstate(all="ignore"):
        squared = np.dot(flat, flat)
        if np.isfinite(squared):
            return
        finite = np.isfinite(flat)
        why = f"its norm overflows (largest value {np.abs(flat).max():.3g})" if finite.all() else f"holds {flat[~finite][0]}"
    raise InputError(f"{file}: not written: tensor {name} {why} in {block.dtype}")


def copy(out: np.ndarray, source: np.ndarray) -> None:
    """Copy a vector or matrix, converting to the dtype of ``out``; in tiles where one of them is transposed."""
    if source.dtype == out.dtype:  # plain integers copy several times as fast as bfloat16
        bits = np.dtype(f"u{out.dtype.itemsize}")
        source, out = source.view(bits), out.view(bits)
    if out.ndim < 2 or out.strides[1] == source.strides[1] == source.itemsize:
        out[...] = source
        return
    for i in range(0, out.shape[0], _TILE):
        for j in range(0, out.shape[1], _TILE):
            out[i : i + _TILE, j : j + _TILE] = source[i : i + _TILE, j : j + _TILE]
