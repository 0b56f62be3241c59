"""Weights from devices to Hugging Face folders, atomically; the other way: ``weights.py``.

Beside what the devices keep the host holds one layer of one array, or one array without layers.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from panacea_jax.disk import growing
from panacea_jax.errors import InputError
from panacea_jax.models import tensorfile
from panacea_jax.models.adapter import Adapter, merged
from panacea_jax.models.names import to_hf
from panacea_jax.models.quantise import whole
from panacea_jax.models.weights import INDEX, SINGLE, is_stacked
from panacea_jax.parallel import processes


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
        SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        for i in range(count)
    ]
    for file, shard in zip(files, shards):
        write_file(folder / file, shard)
    if count > 1 and processes.first():
        weight_map = {tensor.name: file for file, shard in zip(files, shards) for tensor in shard}
        total = sum(tensor.size for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
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
        if not is_stacked(path):
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
