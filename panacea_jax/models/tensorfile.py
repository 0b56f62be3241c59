"""The safetensors container, read by byte range and written as a stream.

Format: eight bytes (length of the header, little endian), a JSON header ``{name: {"dtype", "shape",
"data_offsets"}}``, the bytes of the tensors. The safetensors package reads whole tensors for numpy;
a shard of a large matrix needs only some rows, and a 16 GB model must not pass through memory
twice, hence these few lines. Nothing here can run code from a file.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from panacea_jax.errors import InputError

DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        name: its name in the file.
        file: the file.
        dtype: element type as the file spells it, e.g. ``"BF16"``.
        shape: as stored.
        start: offset of its first byte in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def view(self) -> np.ndarray:
        """Its values, as a read-only map of the file: only what is indexed gets read.

        Raises:
            InputError: the element type is not a floating-point type that we load.
        """
        if self.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise InputError(
                f"{self.file}: tensor {self.name} has type {self.dtype}; known: {known}"
            )
        dtype = DTYPES[self.dtype]
        size = int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize
        mapped = _map(self.file)[self.start : self.start + size]
        return mapped.view(dtype).reshape(self.shape)


@functools.lru_cache(maxsize=4)
def _map_version(file: Path, changed: int) -> np.ndarray:
    return np.memmap(file, dtype=np.uint8, mode="r")


def _map(file: Path) -> np.ndarray:
    return _map_version(file, file.stat().st_mtime_ns)


def read_header(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name.

    Raises:
        InputError: missing, damaged or truncated; names the file, and the tensor that is cut off.
    """
    try:
        total = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if total < 8 or length > total - 8:
                raise InputError(f"{file}: truncated or not a safetensors file (header cut off)")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{file}: damaged safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise InputError(f"{file}: damaged safetensors header: not an object")
    header.pop("__metadata__", None)
    return {name: _tensor(name, file, entry, 8 + length, total) for name, entry in header.items()}


def _tensor(name: str, file: Path, entry: Any, data: int, total: int) -> Tensor:
    """One header entry, checked against the file's size."""
    try:
        shape = tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
        dtype = str(entry["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: tensor {name}: damaged header entry") from error
    if data + end > total:
        missing = data + end - total
        raise InputError(f"{file}: truncated: tensor {name} lacks {missing} bytes")
    size = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize if dtype in DTYPES else None
    if not 0 <= begin <= end or min(shape, default=0) < 0 or size not in (None, end - begin):
        raise InputError(f"{file}: tensor {name}: {end - begin} bytes do not hold shape {shape}")
    return Tensor(name, file, dtype, shape, data + begin)


def write(
    file: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], np.dtype[Any], Callable[[], np.ndarray]]],
) -> None:
    """Write tensors ``(name, shape, dtype, values)`` one after the other; each ``values()`` is
    called when its turn comes.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype, _ in tensors:
        end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers expect the data to be aligned
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, shape, dtype, values in tensors:
            array = np.ascontiguousarray(values(), dtype)
            if array.shape != shape:
                raise ValueError(f"{array.shape} given for a tensor declared as {shape}")
            stream.write(array.reshape(-1).view(np.uint8).data)
