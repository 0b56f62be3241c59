"""What leaves a run: the adapter or model to deploy (ε applied), and ε on its own."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from panacea_jax.data.tokenizer import TOKENIZER_FILES
from panacea_jax.disk import replacing_file
from panacea_jax.errors import InputError
from panacea_jax.models.adapter import BLOCK_OF, Adapter
from panacea_jax.models.config import read_config
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import Model
from panacea_jax.models.names import to_ours
from panacea_jax.models.peft import adapter_tensors, read_notes, save_adapter
from panacea_jax.models.saving import entries, save_weights, write_file
from panacea_jax.models.tensorfile import Entry, entries_of
from panacea_jax.parallel import processes
from panacea_jax.progress import say
from panacea_jax.records.jsonl import encode_line
from panacea_jax.stores import by_address
from panacea_jax.train.checkpoints import read_checkpoint
from panacea_jax.train.loop import Result
from panacea_jax.untrusted import opened, parsing

# Everything of a Hugging Face folder that is not weights and travels with an exported model; with an adapter only the tokenizer's.
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json")
WITHOUT_EPSILON = "w alone can be MORE harmful than plain fine-tuning; deploy w + ε instead"


def export_adapter(result: Result, folder: str | Path, *, without_epsilon: bool = False) -> Path:
    """Write the PEFT adapter to deploy: w + ε.

    Args:
        result: of :func:`panacea_jax.finetune`, LoRA mode.
        folder: PEFT folder to write.
        without_epsilon: write w alone; a warning is given.

    Raises:
        InputError: all parameters were trained (use :func:`export_model`), or a tensor is not finite; then what was there stays.
    """
    params, note = deployed(result, without_epsilon)
    if not isinstance(params, Adapter):
        raise InputError(
            "export_adapter: all parameters were trained, so there is no adapter; use export_model"
        )
    write_adapter(result.model, params, Path(folder), by_address(result.model.folder or ""), note)
    return Path(folder)


def export_model(result: Result, folder: str | Path, *, without_epsilon: bool = False) -> Path:
    """Write the whole model to deploy as a Hugging Face folder, adapter merged in float32 and ε applied.

    Args:
        result: of :func:`panacea_jax.finetune`, either mode.
        folder: Hugging Face folder to write.
        without_epsilon: leave ε out; a warning is given.
    """
    save_model(result.model, deployed(result, without_epsilon)[0], Path(folder))
    return Path(folder)


def write_adapter(model: Model, params: Adapter, folder: Path, base: str, notes: Mapping[str, str]) -> None:
    """Write a PEFT folder with the tokenizer's files of the base.

    Args:
        model: the base.
        params: the adapter.
        folder: created if missing.
        base: path or hub id of the base, noted in the adapter's configuration.
        notes: see ``save_adapter``.
    """
    save_adapter(params, folder, base, notes, nested=model.config.nested)
    _bring_along(model, TOKENIZER_FILES, folder)


def _bring_along(model: Model, patterns: Sequence[str], folder: Path) -> None:
    """Copy files of the folder that the model came from, if it came from one; of several processes the first does."""
    if model.folder is None or not processes.first():
        return
    for path in (p for pattern in patterns for p in model.folder.glob(pattern)):
        if path.is_file():
            shutil.copy(path, folder / path.name)


def save_model(model: Model, params: Any, folder: Path) -> None:
    """Merge ``params`` (an Adapter, all weights, or None) into the base and write a Hugging Face folder like the base's.

    Raises:
        InputError: the model has no folder of origin to take its config and tokenizer from, or a tensor is not finite as it is written.
    """
    if model.folder is None:
        raise InputError(
            "export: the model did not come from a Hugging Face folder, so there is no config.json to write"
        )
    adapter = params if isinstance(params, Adapter) else None
    weights = params if isinstance(params, Mapping) else model.weights
    hf_config = read_config(model.folder)
    if config_from_dict(hf_config).tie_embeddings != model.config.tie_embeddings:
        hf_config["tie_word_embeddings"] = model.config.tie_embeddings  # as the files had it
    save_weights(
        weights, folder, hf_config, adapter=adapter, dtype=stored_dtype(hf_config),
        companions=lambda made: _bring_along(model, COMPANIONS, made),
    )  # fmt: skip


def stored_dtype(hf_config: Mapping[str, Any]) -> str:
    """The dtype that a Hugging Face config says its weights are stored in."""
    return str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")


def deployed(result: Result, without_epsilon: bool = False) -> tuple[Any, dict[str, str]]:
    """What leaves a run, decided here alone: w + ε, or with ``without_epsilon`` w, upon which a warning is given.

    Returns:
        The parameters, and what an exported adapter says of ε, so that nobody adds it twice: "applied" or "left out".
    """
    if result.epsilon is None:
        return result.deployed, {}
    if not without_epsilon:
        return result.deployed, {"epsilon": "applied"}
    warn_of_bare("exporting w without ε")
    return result.params, {"epsilon": "left out"}


def warn_of_bare(what: str) -> None:
    """Warn that something is done with w alone, in a frame that nobody overlooks: "exporting w without ε"."""
    frame = "!" * 100
    say(frame)
    logging.warning("%s: %s", what, WITHOUT_EPSILON)
    say(frame)


def warn_if_bare(adapter: str | Path, done: str) -> None:
    """Likewise if a PEFT folder, whose weights were read before, says that ε is left out of it.

    Args:
        adapter: the folder.
        done: what is done with it: "merging".
    """
    if read_notes(adapter).get("epsilon") == "left out":
        warn_of_bare(f"{adapter}: {done} w without ε")


def epsilon_tensors(epsilon: Any) -> dict[str, np.ndarray]:
    """ε by PEFT name for an adapter, by Hugging Face name for all weights."""
    return {e.name: np.ascontiguousarray(e.values()) for e in _epsilon_entries(epsilon)}


def _epsilon_entries(epsilon: Any) -> list[Entry]:
    return entries_of(adapter_tensors(epsilon)) if isinstance(epsilon, Adapter) else list(entries(epsilon))


def save_epsilon(epsilon: Any, path: Path, metadata: dict[str, str]) -> None:
    """Write ``epsilon.safetensors``; an adapter's rank, α and layers go into its metadata. Of several processes the first writes."""
    if isinstance(epsilon, Adapter):
        metadata = metadata | {"rank": str(epsilon.rank), "alpha": str(epsilon.alpha)}
        if epsilon.rslora:
            metadata["rslora"] = "True"
        if epsilon.numbers is not None:
            metadata["layers"] = ",".join(map(str, epsilon.numbers))
    if processes.first():
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, _epsilon_entries(epsilon), metadata)


def save_record_weights(weights: Any, path: Path) -> None:
    """Write the weight of each of the user's records, a JSON line each in their order: its number, from 1, and nothing that it says. Of
    several processes, which must all call this, the first writes.

    Args:
        weights: of N records.
        path: ``record_weights.jsonl``.
    """
    values = processes.to_host(weights)
    if processes.first():
        with replacing_file(path) as new:
            lines = (encode_line({"record": i, "weight": float(w)}) for i, w in enumerate(values, 1))
            new.write_bytes(b"".join(lines))


def load_epsilon(path: Path) -> dict[str, Any] | Adapter:
    """An exported ε on the host: adapter factors, or all weights under their own names.

    Returns:
        ``{"self_attn": {"q_proj": {"a": [L, in, r], "b": [L, r, out]}}, …}`` or a weight tree with ``layers``; of some layers only an
        :class:`Adapter`, which knows them by number.

    Raises:
        InputError: unreadable, or the names are not those of an exported ε.
    """
    try:
        with opened(path):  # nothing but a file: on a pipe its reader would wait for ever
            tensors = load_file(path)
        with safe_open(path, framework="numpy") as file:
            notes = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error})") from error
    with parsing(path, "not an exported ε"):
        numbers = tuple(map(int, notes["layers"].split(","))) if "layers" in notes else None
        rank, alpha = int(notes.get("rank", 0)), float(notes.get("alpha", 0))
    rows: dict[str, dict[int | None, np.ndarray]] = {}
    for name, value in tensors.items():
        where = _locate(name)
        if where is None:
            raise InputError(f"{path}: {name} is not a tensor of an exported ε")
        tree_path, layer, transpose = where
        rows.setdefault(tree_path, {})[layer] = value.T if transpose else value
    if not rows:
        raise InputError(f"{path}: holds no tensor")
    flat = {p: _stacked(by_layer, numbers, p, path) for p, by_layer in rows.items()}
    tree = unflatten_dict(flat, sep="/")
    if numbers is None:
        return tree
    return Adapter(tree, rank, alpha, "rslora" in notes, numbers=numbers)


def _stacked(
    by_layer: Mapping[int | None, np.ndarray],
    numbers: tuple[int, ...] | None,
    name: str,
    path: Path,
) -> np.ndarray:
    if None in by_layer:
        return by_layer[None]
    layers = [by_layer.get(i) for i in numbers or range(len(by_layer))]
    if any(x is None or x.shape != layers[0].shape for x in layers):  # type: ignore[union-attr]
        raise InputError(
            f"{path}: {name}: a layer is missing, or its shape differs from the others'"
        )
    return np.stack(layers)  # type: ignore[arg-type]


def adapter_from_checkpoint(folder: Path) -> Adapter:
    """w as a checkpoint holds it, *without* ε, for comparisons; a warning is given, because it must not be deployed.

    Raises:
        InputError: not a checkpoint, or one of an all-parameter run.
    """
    params = _params(*read_checkpoint(folder))
    if not isinstance(params, Adapter):
        raise InputError(f"{folder}: holds all parameters, not an adapter")
    warn_of_bare("exporting w without ε")
    return params


def tensors_in_checkpoint(arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """w as ``read_checkpoint`` read it, by the names that an export would have; to look at, in float32."""
    return epsilon_tensors(_params(arrays, notes))


def _params(arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> Any:
    """The trained tree of a checkpoint: an Adapter, or all weights."""
    prefix = "params."
    tree = unflatten_dict({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}, sep=".")
    if "lora_scale" not in notes:
        return tree
    layers = tree["layers"]
    rank = next(
        iter(
            flatten_dict(
                {k: v["a"] for block in layers.values() for k, v in block.items()}
            ).values()
        )
    ).shape[-1]
    numbers = tuple(notes["lora_layers"]) if "lora_layers" in notes else None
    return Adapter(layers, rank=rank, alpha=notes["lora_scale"] * rank, numbers=numbers)


def _locate(name: str) -> tuple[str, int | None, bool] | None:
    """(path in the tree, layer, transposed?) of a PEFT or Hugging Face name."""
    parts = name.split(".")
    if (
        name.startswith("base_model.model.model.layers.")
        and len(parts) == 9
        and parts[4].isdigit()
        and parts[6] in BLOCK_OF
    ):
        return f"{parts[5]}/{parts[6]}/{parts[7][-1].lower()}", int(parts[4]), True
    found = to_ours(name)
    return None if found is None else (found[0], found[1], found[2] == "transpose")
