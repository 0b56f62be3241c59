"""PEFT adapter folders, in and out: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT names a factor ``base_model.model.model.layers.<l>.<block>.<projection>.lora_A.weight`` with A as ``[r, in]`` and B as ``[out, r]``;
ours are stacked over layers and transposed.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from panacea_jax.errors import InputError
from panacea_jax.models.adapter import BLOCK_OF, Adapter
from panacea_jax.models.model import Model, abstract_model
from panacea_jax.models.precision import wide
from panacea_jax.parallel import processes
from panacea_jax.parallel.sharding import adapter_shardings

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(
    r"base_model\.model\.(?:model|model\.language_model|language_model\.model)\.layers"
    r"\.(\d+)\.(self_attn|mlp)\.(\w+_proj)\.lora_([AB])\.weight"
)

# Settings that change the computation and that we do not have: a folder with one of them on is refused.
_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "fan_in_fan_out",
                "lora_bias", "layer_replication", "exclude_modules", "target_parameters",
                "alora_invocation_tokens", "use_qalora")  # fmt: skip


def adapter_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """Every factor under its PEFT name, on the host; of several processes all must ask, and all receive."""
    tensors = {}
    for target in adapter.targets:
        block = BLOCK_OF[target]
        for factor, letter in (("a", "A"), ("b", "B")):
            stacked = processes.to_host(adapter.layers[block][target][factor])
            for layer, matrix in enumerate(stacked):
                name = (
                    f"base_model.model.model.layers.{layer}.{block}.{target}.lora_{letter}.weight"
                )
                tensors[name] = np.ascontiguousarray(matrix.T)
    return tensors


def save_adapter(
    adapter: Adapter,
    folder: Path,
    base: str,
    notes: Mapping[str, str] | None = None,
    *,
    nested: bool = False,
) -> None:
    """Write a PEFT folder that ``peft.PeftModel.from_pretrained`` takes. Of several processes the first writes.

    Args:
        adapter: what to write.
        folder: created if missing.
        base: path or hub id of the base model, noted in the config.
        notes: further metadata of the safetensors file, see ``read_notes``.
        nested: the base has a vision tower beside the decoder, so transformers' modules have other names.
    """
    tensors = adapter_tensors(adapter)  # in every process: each may hold a part
    if not processes.first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    targets: list[str] | str = list(adapter.targets)
    if nested:
        stem = "base_model.model.model."
        tensors = {f"{stem}language_model.{n.removeprefix(stem)}": x for n, x in tensors.items()}
        targets = rf".*language_model\..*\.({'|'.join(targets)})"  # the tower has a q_proj too
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt", **(notes or {})})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_notes(folder: str | PurePath) -> dict[str, str]:
    """Metadata of an adapter's weights: ours say under ``epsilon`` whether ε is "applied" or "left out"."""
    with safe_open(Path(folder) / WEIGHTS_FILE, "numpy") as file:
        return file.metadata() or {}


def load_adapter(folder: str | PurePath, model: Model) -> Adapter:
    """Load a PEFT LoRA folder onto the model's mesh, in float32 (or float64 when it holds that).

    Raises:
        InputError: a missing or pickle-only folder, a variant of LoRA that is not supported, or factors that do not fit the base.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        why = (
            "has pickled weights only (refused; save it as safetensors)"
            if pickled
            else f"has no {WEIGHTS_FILE}"
        )
        raise InputError(f"{folder}: {why}")
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS_FILE}: damaged or truncated ({error})") from error
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)  # rank-stabilised LoRA scales by α/√r
    layers = _stack(tensors, folder, rank, model)
    places = adapter_shardings(model.mesh, layers)
    return Adapter(jax.device_put(layers, places), rank=rank, alpha=alpha)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, rank, _ = config["peft_type"], int(config["r"]), float(config["lora_alpha"])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; not a PEFT adapter folder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a LoRA configuration ({type(error).__name__}: {error})"
        ) from error
    if kind != "LORA" or rank < 1:
        raise InputError(
            f"{path}: peft_type {kind}, r {rank}; only LoRA with r of 1 or more is supported"
        )
    on = [key for key in _UNSUPPORTED if config.get(key)]
    if on or config.get("bias", "none") != "none":
        raise InputError(f"{path}: {', '.join(on) or 'bias'} is set, which is not supported")
    return config


def _stack(tensors: dict[str, np.ndarray], folder: Path, rank: int, model: Model) -> dict[str, Any]:
    """Per-layer PEFT factors → stacked ones, each checked against the base."""
    where = folder / WEIGHTS_FILE
    found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if not match or BLOCK_OF.get(match[3]) != match[2]:
            raise InputError(f"{where}: {name} is not a LoRA factor of a projection of this model")
        found.setdefault((match[3], match[4]), {})[int(match[1])] = tensor
    layers: dict[str, Any] = {}
    for target in sorted({target for target, _ in found}, key=list(BLOCK_OF).index):
        _, d_in, d_out = abstract_model(model.config)[1][f"layers/{BLOCK_OF[target]}/{target}/kernel"]
        for letter, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            by_layer = found.get((target, letter), {})
            for layer in sorted(by_layer.keys() | set(range(model.config.num_layers))):
                name = f"layers.{layer}.{BLOCK_OF[target]}.{target}.lora_{letter}"
                if layer not in by_layer:
                    raise InputError(f"{where}: {name} is missing")
                if layer >= model.config.num_layers:
                    raise InputError(
                        f"{where}: {name}: the base has {model.config.num_layers} layers"
                    )
                if by_layer[layer].shape != shape:
                    raise InputError(
                        f"{where}: {name} has shape {by_layer[layer].shape}, the base wants {shape}"
                    )
            stacked = np.stack([by_layer[i].T for i in range(model.config.num_layers)])
            layers.setdefault(BLOCK_OF[target], {}).setdefault(target, {})[letter.lower()] = (
                stacked.astype(wide(stacked.dtype))
            )
    if not layers:
        raise InputError(f"{where}: holds no LoRA factors")
    return layers
