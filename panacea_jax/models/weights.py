"""Weights between Hugging Face folders and devices.

Reading: each device's shard of each stacked array is filled from its own byte ranges of the
safetensors files. Writing goes the other way and is atomic. Beside what the devices keep (on a CPU
that is host memory too) the host holds one layer of one array, or one array without layers.
"""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from panacea_jax.disk import growing
from panacea_jax.errors import InputError
from panacea_jax.models import head, tensorfile
from panacea_jax.models.adapter import Adapter, merged
from panacea_jax.models.names import HARMLESS, VISION, alone, to_hf, to_ours
from panacea_jax.models.quantise import whole
from panacea_jax.parallel import processes
from panacea_jax.untrusted import parsing, read_object

Shapes = Mapping[str, tuple[int, ...]]
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
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
        layer: which; None for an array without layers.
        like: ours ``[L, …]``; dtype and placement of the result are those of a layer of it.

    Raises:
        InputError: that folder has no such tensor, or one of another shape.
    """
    name, how = to_hf(path, layer)
    shape = like.shape if layer is None else like.shape[1:]
    stored = shape[::-1] if how == "transpose" else shape
    if name not in tensors:
        raise InputError(f"{next(iter(tensors.values())).file.parent}: tensor {name} is missing")
    tensor = tensors[name]
    if tensor.shape != stored:
        raise InputError(
            f"{tensor.file}: tensor {name} has shape {tensor.shape}, the aligned model's is {stored}"
        )
    place = like.sharding if layer is None else _of_layer(like.sharding)
    return _load_array(shape, np.dtype(like.dtype), place, [tensor], how)


def _transform(path: str) -> str:
    """Transform between our array and Hugging Face's tensor."""
    return to_hf(path, 0 if _stacked(path) else None)[1]


def _stacked(path: str) -> bool:
    return path.startswith("layers/")


def find_tensors(folder: Path) -> dict[str, tensorfile.Tensor]:
    """Every tensor in the folder's safetensors files, by Hugging Face name; a decoder's as it is without a vision tower.

    Raises:
        InputError: no such files (or pickled ones only), a damaged index or file, or a tensor the
            index promises in vain.
    """
    if (folder / _SINGLE).is_file():
        return _alone(tensorfile.read_header(folder / _SINGLE))
    index = folder / _INDEX
    if not index.is_file():
        pickles = sorted(p.name for p in folder.glob("*") if _PICKLES.fullmatch(p.name))
        if pickles:
            raise InputError(
                f"{folder / pickles[0]}: pickled weights are refused (they can run code); "
                f"convert them to safetensors"
            )
        raise InputError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there")
    content = read_object(index, "damaged index of shards", strict=True)
    with parsing(index, "damaged index of shards"):
        items = [(str(name), str(file)) for name, file in content["weight_map"].items()]
    found: dict[str, tensorfile.Tensor] = {}
    for file in sorted({file for _, file in items}):
        if PurePath(file).name != file or file in ("", "..") or "\0" in file or len(file) > LONGEST_NAME:
            raise InputError(f"{index}: shard {file!r:.80} is not a file of this folder")
        if not (folder / file).is_file():
            raise InputError(f"{folder / file}: missing; {_INDEX} lists it")
        found |= tensorfile.read_header(folder / file)
    for name, file in items:
        if name not in found:
            raise InputError(f"{folder / file}: tensor {name} is missing; {_INDEX} promises it")
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


def save_weights(
    weights: Mapping[str, Any],
    folder: str | PurePath,
    hf_config: Mapping[str, Any],
    *,
    adapter: Adapter | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    companions: Callable[[Path], None] = lambda _: None,
) -> Path:
    """Write a model as a Hugging Face folder, see :func:`save_tensors`.

    Args:
        weights: nested dict of arrays.
        folder: to be made; may exist if it is empty.
        hf_config: contents of ``config.json``; its dtype is set to the one written.
        adapter: merged into the weights on the way.
        dtype: dtype to convert to; as they are by default.
        max_shard_bytes: largest file, unless a single tensor is larger.
        companions: writes what else belongs into the folder.

    Raises:
        InputError: see :func:`save_tensors`.
    """
    tensors = list(entries(weights, adapter, dtype))
    return save_tensors(tensors, folder, hf_config, max_shard_bytes=max_shard_bytes, companions=companions)


def save_tensors(
    tensors: Sequence[tensorfile.Entry],
    folder: str | PurePath,
    hf_config: Mapping[str, Any],
    *,
    max_shard_bytes: int = 5_000_000_000,
    companions: Callable[[Path], None] = lambda _: None,
) -> Path:
    """Write a Hugging Face folder: ``config.json`` and safetensors, in shards (with an index)
    beyond ``max_shard_bytes``.

    The folder appears complete or not at all. In a run of several processes all must call; the
    first writes.

    Args:
        tensors: under their Hugging Face names.
        folder: to be made; may exist if it is empty.
        hf_config: contents of ``config.json``; its dtype is set to that of the largest tensor.
        max_shard_bytes: largest file, unless a single tensor is larger.
        companions: writes what else belongs into the folder.

    Raises:
        InputError: the folder exists and is not empty, or cannot be written; or a tensor is not finite.
    """
    target = Path(folder)
    # The first alone looks: the others may be late, and it may have written by then.
    if (
        processes.first()
        and target.exists()
        and not (target.is_dir() and not any(target.iterdir()))
    ):
        raise InputError(f"{target}: already there; nothing is overwritten")
    try:
        with growing(target) as partial:
            kept = _write_folder(tensors, partial, max_shard_bytes)
            if processes.first():
                described = {**hf_config, "dtype" if "dtype" in hf_config else "torch_dtype": kept}
                (partial / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")
                companions(partial)
                os.replace(partial, target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from error
    return target


def _write_folder(tensors: Sequence[tensorfile.Entry], folder: Path, max_shard_bytes: int) -> str:
    """Write all tensors and, for several files, the index; returns the dtype of the largest."""
    shards: list[list[tensorfile.Entry]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size
    count = len(shards)
    files = [
        _SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        for i in range(count)
    ]
    for file, shard in zip(files, shards):
        write_file(folder / file, shard)
    if count > 1 and processes.first():
        weight_map = {tensor.name: file for file, shard in zip(files, shards) for tensor in shard}
        total = sum(tensor.size for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return str(max(tensors, key=lambda tensor: tensor.size).dtype)


def write_file(
    file: Path, tensors: Sequence[tensorfile.Entry], metadata: Mapping[str, str] = tensorfile.FORMAT
) -> None:
    """Write one safetensors file. Of several processes, which must all call, the first writes."""
    if processes.first():
        tensorfile.write_tensors(file, tensors, metadata)
    else:
        for tensor in tensors:  # gathering is collective
            tensor.values()


def entries(
    weights: Mapping[str, Any], adapter: Adapter | None = None, dtype: Any = None
) -> Iterator[tensorfile.Entry]:
    """The Hugging Face tensors of a nested dict of arrays, for :func:`write_file`; arguments as of
    :func:`save_weights`.
    """
    pairs = _by_kernel(adapter) if adapter else {}
    scale = adapter.scale if adapter else 1.0
    for path, held in flatten_dict(weights, sep="/").items():
        array = whole(held, "writing the model")
        kept = np.dtype(array.dtype if dtype is None else dtype)
        if not _stacked(path):
            name, how = to_hf(path)
            yield _entry(name, array.shape, how, kept, functools.partial(_itself, array))
            continue
        pair = pairs.get(path)
        for layer in range(array.shape[0]):
            name, how = to_hf(path, layer)
            place = adapter.place(layer) if adapter and pair else None
            own = None if place is None else pair
            part = functools.partial(_layer, array, layer, own, place or 0, scale)
            yield _entry(name, array.shape[1:], how, kept, part)


def _by_kernel(adapter: Adapter) -> dict[str, Mapping[str, jax.Array]]:
    """The factors of an adapter, by the path of the array that their product is added to: a bias has none."""
    return {
        f"layers/{block}/{name}/kernel": pair
        for block, projections in adapter.layers.items()
        for name, pair in projections.items()
    }


def _entry(
    name: str,
    shape: tuple[int, ...],
    how: str,
    dtype: np.dtype[Any],
    part: Callable[[], jax.Array | np.ndarray],
) -> tensorfile.Entry:
    """What to write of an array of ours."""

    def values() -> np.ndarray:
        host = processes.to_host(part())
        return host.T if how == "transpose" else host

    return tensorfile.Entry(name, shape[::-1] if how == "transpose" else shape, dtype, values)


def _itself(array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    return array


@jax.jit
def _layer(
    stacked: jax.Array,
    layer: int | jax.Array,
    pair: Mapping[str, jax.Array] | None,
    place: int | jax.Array,
    scale: float | jax.Array,
) -> jax.Array:
    """One layer of a stacked array, with its adapter's product if it has one."""
    one = jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)
    pair = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), pair)
    return one if pair is None else merged(one, pair, scale)
