"""Weights between Hugging Face folders and devices.

Reading: each device's shard of each stacked array is filled from byte ranges of the safetensors
files, one array at a time, so the host never holds more than one stacked array. Writing goes the
other way and is atomic.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from panacea_jax.errors import InputError
from panacea_jax.models import tensorfile
from panacea_jax.models.names import HARMLESS, to_hf, to_ours
from panacea_jax.parallel import processes

Shapes = Mapping[str, tuple[int, ...]]
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt)(\.index\.json)?$")
# Tile of a transposed copy: 2.4 times as fast as row by row on a matrix that does not fit the
# cache.
_TILE = 64


def load_weights(
    folder: Path,
    shapes: Shapes,
    dtype: Any,
    shardings: Mapping[str, jax.sharding.Sharding],
    finish: Callable[[str, jax.Array], Any] = lambda _, array: array,
) -> dict[str, Any]:
    """Stream a folder's weights to where they live.

    Args:
        folder: with ``model.safetensors``, or shards and ``model.safetensors.index.json``.
        shapes: what the model needs, by path.
        dtype: dtype of the result; stored values are converted.
        shardings: placement of each array, by path.
        finish: what becomes of an array, by its path, before the next one is loaded.

    Returns:
        Nested dict of arrays, layers stacked on axis 0.

    Raises:
        InputError: missing, extra, misshaped or truncated tensor, unreadable file, or pickled
            weights; names tensor and file.
    """
    found = _match(find_tensors(folder), shapes, folder)
    flat = {
        path: finish(path, _load_array(shape, np.dtype(dtype), shardings[path], found[path], _transform(path)))
        for path, shape in shapes.items()
    }  # fmt: skip
    return unflatten_dict(flat, sep="/")


def load_layer(
    tensors: Mapping[str, tensorfile.Tensor], path: str, layer: int, like: jax.Array
) -> jax.Array:
    """One layer of another folder's stacked array, for comparing two models without loading the second.

    Args:
        tensors: of that folder, see ``find_tensors``.
        path: of the array.
        layer: which.
        like: ours ``[L, …]``; dtype and placement of the result are those of a layer of it.

    Raises:
        InputError: that folder has no such tensor, or one of another shape.
    """
    name, how = to_hf(path, layer)
    shape = like.shape[1:]
    stored = shape[::-1] if how == "transpose" else shape
    if name not in tensors:
        raise InputError(f"{next(iter(tensors.values())).file.parent}: tensor {name} is missing")
    tensor = tensors[name]
    if tensor.shape != stored:
        raise InputError(
            f"{tensor.file}: tensor {name} has shape {tensor.shape}, the aligned model's is {stored}"
        )
    assert isinstance(like.sharding, jax.sharding.NamedSharding)
    spec = jax.sharding.PartitionSpec(*like.sharding.spec[1:])
    sharding = jax.sharding.NamedSharding(like.sharding.mesh, spec)
    return _load_array(shape, np.dtype(like.dtype), sharding, [tensor], how)


def _transform(path: str) -> str:
    """Transform between our array and Hugging Face's tensor."""
    return to_hf(path, 0 if _stacked(path) else None)[1]


def _stacked(path: str) -> bool:
    return path.startswith("layers/")


def find_tensors(folder: Path) -> dict[str, tensorfile.Tensor]:
    """Every tensor in the folder's safetensors files, by Hugging Face name.

    Raises:
        InputError: no such files (or pickled ones only), a damaged index or file, or a tensor the
            index promises in vain.
    """
    if (folder / _SINGLE).is_file():
        return tensorfile.read_header(folder / _SINGLE)
    index = folder / _INDEX
    if not index.is_file():
        pickles = sorted(p.name for p in folder.glob("*") if _PICKLES.fullmatch(p.name))
        if pickles:
            raise InputError(
                f"{folder / pickles[0]}: pickled weights are refused (they can run code); "
                f"convert them to safetensors"
            )
        raise InputError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there")
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        items = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: damaged index of shards: {error!r}") from error
    found: dict[str, tensorfile.Tensor] = {}
    for file in sorted({file for _, file in items}):
        if PurePath(file).name != file:
            raise InputError(f"{index}: shard {file!r} is not a file of this folder")
        if not (folder / file).is_file():
            raise InputError(f"{folder / file}: missing; {_INDEX} lists it")
        found |= tensorfile.read_header(folder / file)
    for name, file in items:
        if name not in found:
            raise InputError(f"{folder / file}: tensor {name} is missing; {_INDEX} promises it")
    return found


def _match(
    tensors: Mapping[str, tensorfile.Tensor], shapes: Shapes, folder: Path
) -> dict[str, list[tensorfile.Tensor]]:
    """The tensors of each array, layer by layer, after checking that all are there and fit."""
    wanted = dict(_wanted(shapes))
    missing = [name for name in wanted if name not in tensors]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{folder}: tensor {missing[0]} is missing{more}")
    for name, tensor in tensors.items():
        if name in wanted:
            if tensor.shape != wanted[name][1]:
                raise InputError(
                    f"{tensor.file}: tensor {name} has shape {tensor.shape}, "
                    f"config.json asks for {wanted[name][1]}"
                )
        elif not (HARMLESS.fullmatch(name) or _tied_head(name, shapes)):
            kind = "layer or bias" if to_ours(name) else "tensor"
            raise InputError(f"{tensor.file}: extra tensor {name}: config.json has no such {kind}")
    found: dict[str, list[tensorfile.Tensor]] = {path: [] for path in shapes}
    for name, (path, _) in wanted.items():
        tensors[name].view()  # refuses an element type that cannot be loaded
        found[path].append(tensors[name])
    return found


def _tied_head(name: str, shapes: Shapes) -> bool:
    """A copy of the embedding that some exporters write for tied models; transformers ignores it
    too.
    """
    mapped = to_ours(name)
    return mapped is not None and mapped[0] == "lm_head/kernel" and mapped[0] not in shapes


def _wanted(shapes: Shapes) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """``(Hugging Face name, (path, shape there))`` of each tensor; layers in order."""
    for path, shape in shapes.items():
        layers: list[int | None] = list(range(shape[0])) if _stacked(path) else [None]
        inner = shape[1:] if _stacked(path) else shape
        for layer in layers:
            name, how = to_hf(path, layer)
            yield name, (path, inner[::-1] if how == "transpose" else inner)


def _load_array(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    sharding: jax.sharding.Sharding,
    tensors: list[tensorfile.Tensor],
    how: str,
) -> jax.Array:
    """One array, each shard from the byte ranges that it needs."""
    done: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def shard(index: Any) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape))
        if bounds not in done:  # replicas ask again for what was read
            out = np.empty([stop - start for start, stop in bounds], dtype)
            stacked = len(shape) > len(tensors[0].shape)
            inner = bounds[1:] if stacked else bounds
            chosen = tensors[slice(*bounds[0])] if stacked else tensors
            for part, tensor in zip(out if stacked else [out], chosen):
                _fill(part, tensor.view(), inner, how)
            done[bounds] = out
        return done[bounds]

    return jax.make_array_from_callback(shape, sharding, shard)


def _fill(
    out: np.ndarray, source: np.ndarray, bounds: tuple[tuple[int, int], ...], how: str
) -> None:
    """Copy the part of ``source`` within our ``bounds`` into ``out``, converting to its dtype."""
    slices = tuple(slice(*b) for b in bounds)
    if source.dtype == out.dtype:  # plain integers copy several times as fast as bfloat16
        bits = np.dtype(f"u{out.dtype.itemsize}")
        source, out = source.view(bits), out.view(bits)
    if how != "transpose":
        out[...] = source[slices]
        return
    part = source[slices[::-1]].T
    for i in range(0, out.shape[0], _TILE):
        for j in range(0, out.shape[1], _TILE):
            out[i : i + _TILE, j : j + _TILE] = part[i : i + _TILE, j : j + _TILE]


def save_weights(
    weights: Mapping[str, Any],
    folder: str | PurePath,
    hf_config: Mapping[str, Any],
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a Hugging Face folder: ``config.json`` and safetensors, in shards (with an index)
    beyond ``max_shard_bytes``.

    The folder appears complete or not at all. In a run of several processes all must call; the
    first writes.

    Args:
        weights: nested dict of arrays.
        folder: to be made; may exist if it is empty.
        hf_config: contents of ``config.json``; its dtype is set to the one written.
        dtype: dtype to convert to; as they are by default.
        max_shard_bytes: largest file, unless a single tensor is larger.

    Raises:
        InputError: the folder exists and is not empty, or cannot be written.
    """
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target}: already there; nothing is overwritten")
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        if processes.first():
            partial.mkdir(parents=True)
        kept = _write_tensors(weights, partial, dtype, max_shard_bytes)
        if processes.first():
            described = {**hf_config, "dtype" if "dtype" in hf_config else "torch_dtype": kept}
            (partial / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")
            os.replace(partial, target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


_Entry = tuple[str, tuple[int, ...], np.dtype[Any], Callable[[], np.ndarray]]


def _write_tensors(
    weights: Mapping[str, Any], folder: Path, dtype: Any, max_shard_bytes: int
) -> str:
    """Write all tensors and, for several files, the index; returns the dtype of the largest."""
    entries = list(_entries(flatten_dict(weights, sep="/"), dtype))
    shards: list[list[_Entry]] = [[]]
    room = max_shard_bytes
    for entry in entries:
        size = _size(entry)
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= size
    count = len(shards)
    files = [
        _SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        for i in range(count)
    ]
    for file, shard in zip(files, shards):
        if processes.first():
            tensorfile.write(folder / file, shard)
        else:  # gathering is collective
            for entry in shard:
                entry[3]()
    if count > 1 and processes.first():
        weight_map = {entry[0]: file for file, shard in zip(files, shards) for entry in shard}
        total = sum(map(_size, entries))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return str(max(entries, key=_size)[2])


def _size(entry: _Entry) -> int:
    return int(np.prod(entry[1], dtype=np.int64)) * entry[2].itemsize


def _entries(flat: Mapping[str, jax.Array], dtype: Any) -> Iterator[_Entry]:
    """What to write: all layers of an array in a row, so that each array is fetched from the
    devices once.
    """
    for path, array in flat.items():
        kept = np.dtype(array.dtype if dtype is None else dtype)
        fetch = _Fetched(array)
        layers: list[int | None] = list(range(array.shape[0])) if _stacked(path) else [None]
        inner = array.shape[1:] if _stacked(path) else array.shape
        for layer in layers:
            name, how = to_hf(path, layer)
            shape = tuple(inner[::-1] if how == "transpose" else inner)
            yield name, shape, kept, fetch.reader(layer, how, kept, last=layer == layers[-1])


class _Fetched:
    """An array brought to the host when its first layer is asked for, and let go after its last."""

    def __init__(self, array: jax.Array) -> None:
        self.array = array
        self.host: np.ndarray | None = None

    def reader(
        self, layer: int | None, how: str, dtype: np.dtype[Any], last: bool
    ) -> Callable[[], np.ndarray]:
        """A function that returns one layer as Hugging Face stores it."""

        def read() -> np.ndarray:
            host = to_host(self.array) if self.host is None else self.host
            self.host = None if last else host
            part = host if layer is None else host[layer]
            if how != "transpose":
                return part.astype(dtype)
            out = np.empty(part.shape[::-1], dtype)
            _fill(out, part, tuple((0, n) for n in out.shape), "transpose")
            return out

        return read


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array in host memory, gathered from all processes if need be."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
