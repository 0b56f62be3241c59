"""Weights from Hugging Face folders to devices; the other way: ``saving.py``.

Each device's shard of each stacked array is filled from its own byte ranges of the safetensors
files. Beside what the devices keep (on a CPU that is host memory too) the host holds one layer of
one array, or one array without layers.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import unflatten_dict

from panacea_jax.errors import InputError
from panacea_jax.models import head, tensorfile
from panacea_jax.models.names import HARMLESS, VISION, alone, to_hf, to_ours
from panacea_jax.untrusted import parsing, read_object

Shapes = Mapping[str, tuple[int, ...]]
# A folder's one file, or the list of its shards.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Characters of a file's name.
LONGEST_NAME = 200
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt)(\.index\.json)?$")
# Bytes of a stacked array beyond which it goes to accelerators layer by layer; below, compiling for
# its shape would take longer than loading it.
WHOLE = 64 * 2**20


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
    found = _match(head.by_embedding(find_tensors(folder), shapes), shapes, folder)
    flat = {
        path: finish(path, _load_array(shape, np.dtype(dtype), shardings[path], found[path], _transform(path)))
        for path, shape in shapes.items()
    }  # fmt: skip
    return unflatten_dict(flat, sep="/")


def load_layer(
    tensors: Mapping[str, tensorfile.Tensor], path: str, layer: int | None, like: jax.Array
) -> jax.Array:
    """One layer of another folder's stacked array, for comparing two models without loading the second.

    Args:
        tensors: of that folder, see ``find_tensors``.
        path: of the array.
        layer: which; None: the array has no layers, and all of it is loaded.
        like: ours ``[L, …]``; dtype and placement of the result are those of a layer of it.

    Raises:
        InputError: that folder has no such tensor, or one of another shape.
    """
    name, how = to_hf(path, layer)
    shape, sharding = (like.shape, like.sharding) if layer is None else (like.shape[1:], _of_layer(like.sharding))
    stored = shape[::-1] if how == "transpose" else shape
    if name not in tensors:
        raise InputError(f"{next(iter(tensors.values())).file.parent}: tensor {name} is missing")
    tensor = tensors[name]
    if tensor.shape != stored:
        raise InputError(
            f"{tensor.file}: tensor {name} has shape {tensor.shape}, the other model's is {stored}"
        )
    return _load_array(shape, np.dtype(like.dtype), sharding, [tensor], how)


def _transform(path: str) -> str:
    """Transform between our array and Hugging Face's tensor."""
    return to_hf(path, 0 if is_stacked(path) else None)[1]


def is_stacked(path: str) -> bool:
    """Whether an array of ours holds all layers."""
    return path.startswith("layers/")


def find_tensors(folder: Path) -> dict[str, tensorfile.Tensor]:
    """Every tensor in the folder's safetensors files, by Hugging Face name; a decoder's as it is without a vision tower.

    Raises:
        InputError: no such files (or pickled ones only), a damaged index or file, or a tensor the
            index promises in vain.
    """
    if (folder / SINGLE).is_file():
        return _alone(tensorfile.read_header(folder / SINGLE))
    index = folder / INDEX
    if not index.is_file():
        pickles = sorted(p.name for p in folder.glob("*") if _PICKLES.fullmatch(p.name))
        if pickles:
            raise InputError(
                f"{folder / pickles[0]}: pickled weights are refused (they can run code); "
                f"convert them to safetensors"
            )
        raise InputError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
    content = read_object(index, "damaged index of shards", strict=True)
    with parsing(index, "damaged index of shards"):
        items = [(str(name), str(file)) for name, file in content["weight_map"].items()]
    found: dict[str, tensorfile.Tensor] = {}
    for file in sorted({file for _, file in items}):
        if PurePath(file).name != file or file in ("", "..") or "\0" in file or len(file) > LONGEST_NAME:
            raise InputError(f"{index}: shard {file!r:.80} is not a file of this folder")
        if not (folder / file).is_file():
            raise InputError(f"{folder / file}: missing; {INDEX} lists it")
        found |= tensorfile.read_header(folder / file)
    for name, file in items:
        if name not in found:
            raise InputError(f"{folder / file}: tensor {name} is missing; {INDEX} promises it")
    return _alone(found)


def _alone(tensors: Mapping[str, tensorfile.Tensor]) -> dict[str, tensorfile.Tensor]:
    return {alone(name): tensor for name, tensor in tensors.items()}


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
        elif not (HARMLESS.fullmatch(name) or VISION.fullmatch(name) or name == head.HEAD):
            kind = "layer or bias" if to_ours(name) else "tensor"
            raise InputError(f"{tensor.file}: extra tensor {name}: config.json has no such {kind}")
    if vision := sum(bool(VISION.fullmatch(name)) for name in tensors):
        logging.warning("%s: %d tensors of the vision tower are left alone: text only", folder, vision)
    found: dict[str, list[tensorfile.Tensor]] = {path: [] for path in shapes}
    for name, (path, _) in wanted.items():
        _ = tensors[name].element  # refuses one that cannot be loaded
        found[path].append(tensors[name])
    return found


def hf_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shape of each Hugging Face tensor of a model, by name."""
    return {name: shape for name, (_, shape) in _wanted(shapes)}


def _wanted(shapes: Shapes) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """``(Hugging Face name, (path, shape there))`` of each tensor; layers in order."""
    for path, shape in shapes.items():
        layers: list[int | None] = list(range(shape[0])) if is_stacked(path) else [None]
        inner = shape[1:] if is_stacked(path) else shape
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
    stacked = len(shape) > len(tensors[0].shape)
    if stacked and math.prod(shape) * dtype.itemsize > WHOLE and _apart(sharding):
        return _load_by_layer(shape, dtype, sharding, tensors, how)
    done: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def shard(index: Any) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape))
        if bounds not in done:  # replicas ask again for what was read
            out = _empty([stop - start for start, stop in bounds], dtype)
            inner = bounds[1:] if stacked else bounds
            chosen = tensors[slice(*bounds[0])] if stacked else tensors
            for part, tensor in zip(out if stacked else [out], chosen):
                _fill(part, tensor, inner, how)
            done[bounds] = out
        return done[bounds]

    # Waiting, since the host's buffers live until the devices have them.
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, shard))


def _apart(sharding: jax.sharding.Sharding) -> bool:
    """Whether the devices have a memory of their own."""
    devices: Any = sharding.device_set
    return any(device.platform != "cpu" for device in devices)


def _empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """An array that jax's CPU backend takes as it is, without a copy: it begins at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _load_by_layer(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    sharding: jax.sharding.Sharding,
    tensors: list[tensorfile.Tensor],
    how: str,
) -> jax.Array:
    """The same, put together on the devices."""
    one = _of_layer(sharding)
    array = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    put = jax.jit(_put, donate_argnums=0, out_shardings=sharding)
    for layer, tensor in enumerate(tensors):
        array = put(array, _load_array(shape[1:], dtype, one, [tensor], how), layer)
    return jax.block_until_ready(array)


def _put(stacked: jax.Array, piece: jax.Array, layer: int | jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, piece, layer, 0)


def _of_layer(sharding: jax.sharding.Sharding) -> jax.sharding.NamedSharding:
    """Placement of one layer of an array that lies so; the layers themselves are never split."""
    assert isinstance(sharding, jax.sharding.NamedSharding)
    spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
    return jax.sharding.NamedSharding(sharding.mesh, spec)


def _fill(
    out: np.ndarray, tensor: tensorfile.Tensor, bounds: Sequence[tuple[int, int]], how: str
) -> None:
    """Read the part of ``tensor`` within our ``bounds`` into ``out``, converting to its dtype."""
    transposed = how == "transpose"
    stored = out.T if transposed else out
    done = 0
    for block in tensor.blocks(bounds[::-1] if transposed else bounds):
        tensorfile.copy(stored[done : done + len(block)], block)
        done += len(block)
