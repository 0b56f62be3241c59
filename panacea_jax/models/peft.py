"""PEFT adapter folders, in and out: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT names a factor ``base_model.model.model.layers.<l>.<block>.<projection>.lora_A.weight`` with A as ``[r, in]`` and B as ``[out, r]``;
ours are stacked over layers and transposed.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from panacea_jax.errors import InputError
from panacea_jax.models.adapter import BLOCK_OF, Adapter
from panacea_jax.models.model import Model, abstract_model
from panacea_jax.models.peft_base import check_copy, lost_factors
from panacea_jax.models.peft_config import CONFIG_FILE, PeftConfig, read_peft_config
from panacea_jax.models.precision import wide
from panacea_jax.models.tensorfile import FORMAT, STORED_DTYPES, entries_of, write_tensors
from panacea_jax.parallel import processes
from panacea_jax.parallel.sharding import adapter_shardings
from panacea_jax.progress import Progress
from panacea_jax.stores import stand_in
from panacea_jax.workdir import write_text

WEIGHTS_FILE = "adapter_model.safetensors"
_FACTOR = re.compile(
    r"base_model\.model\.((model|model\.language_model|language_model\.model)\.layers"
    r"\.(\d+)\.(self_attn|mlp)\.(\w+_proj))\.lora_([AB])\.weight"
)


def adapter_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """Every factor under its PEFT name, on the host; of several processes all must ask, and all receive."""
    tensors = {}
    for target in adapter.targets:
        block = BLOCK_OF[target]
        for factor, letter in (("a", "A"), ("b", "B")):
            stacked = processes.to_host(adapter.layers[block][target][factor])
            for layer, matrix in zip(adapter.adapted, stacked):
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

    Raises:
        InputError: a factor is not finite, see ``tensorfile.write_tensors``.
    """
    tensors = adapter_tensors(adapter)  # in every process: each may hold a part
    if not processes.first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    targets: list[str] | str = list(adapter.targets)
    layers: dict[str, Any] = {} if adapter.numbers is None else {"layers_to_transform": list(adapter.numbers)}
    if nested:
        stem = "base_model.model.model."
        tensors = {f"{stem}language_model.{n.removeprefix(stem)}": x for n, x in tensors.items()}
        # The tower has a q_proj too, and beside an expression peft takes no numbers of layers.
        chosen = "" if adapter.numbers is None else rf"\.layers\.({'|'.join(map(str, adapter.numbers))})"
        targets, layers = rf".*language_model{chosen}\..*\.({'|'.join(targets)})", {}
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": targets,
        **layers,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": adapter.rslora,
    }
    write_tensors(folder / WEIGHTS_FILE, entries_of(tensors), {**FORMAT, **(notes or {})})
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def read_notes(folder: str | PurePath) -> dict[str, str]:
    """Metadata of an adapter's weights: ours say under ``epsilon`` whether ε is "applied" or "left out"."""
    with safe_open(stand_in(folder) / WEIGHTS_FILE, "numpy") as file:
        return file.metadata() or {}


def load_adapter(folder: str | PurePath, model: Model, *, frozen: bool = False) -> Adapter:
    """Load a PEFT LoRA folder onto the model's mesh, in float32 (or float64 when it holds that).

    The stacks hold the layers that are adapted. Ranks and scales that differ from module to module become those of the largest rank, with
    zeros beside the smaller ones and the rest of the scale in B; where projections differ in their layers, zeros fill up all of them. An
    adapter for a base that lost a part of itself (PiSSA, OLoRA) becomes one of twice the rank for the whole base.

    Args:
        folder: ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: the base. Where its weights are None only shapes count: factors that follow from the weights are NaN.
        frozen: it will not be trained, hence it may hold zeros where nothing is adapted.

    Raises:
        InputError: a missing or pickle-only folder, a variant of LoRA that is not supported, factors that do not fit the base; one that
            is uneven and to be trained.
    """
    folder = stand_in(folder)
    config = read_peft_config(folder)
    where = folder / WEIGHTS_FILE
    factors, stem = {}, "model"
    for name, tensor in _tensors(folder).items():
        match = _FACTOR.fullmatch(name)
        if match and BLOCK_OF.get(match[5]) == match[4]:
            factors[match[1], match[6]], stem = tensor, match[2]
            if int(match[3]) >= model.config.num_layers:
                raise InputError(f"{where}: {name}: the base has {model.config.num_layers} layers")
            if not config.adapts(match[1]):
                raise InputError(f"{where}: {name}: {config.path.name} does not adapt that module")
        else:
            check_copy(name, tensor, model, where)
    if not factors:
        raise InputError(f"{where}: holds no LoRA factors")
    modules = _modules(config, model, stem)
    _check_factors(factors, modules, where)
    targets, ranks, numbers = {m.target for m in modules}, {m.rank for m in modules}, sorted({m.layer for m in modules})
    alike = len(modules) == len(targets) * len(numbers)
    even = alike and len(ranks) == 1
    if not (even or frozen):
        raise InputError(
            f"{folder}: its layers or ranks differ from module to module, which training does not keep; `panacea convert` "
            "(or for finetune config.lora.policy = merged) makes it part of the base"
        )
    adapter = _stack(factors, modules, config, model, numbers if alike else range(model.config.num_layers))
    places = adapter_shardings(model.mesh, adapter.layers)
    return dataclasses.replace(adapter, layers=jax.device_put(adapter.layers, places))


class _Module(NamedTuple):
    """An adapted projection of one layer.

    Attributes:
        name: in transformers.
        layer, target: where it is here.
        shape: of A and of B, as peft keeps them.
        rank, scale: r, and what the product is multiplied by.
    """

    name: str
    layer: int
    target: str
    shape: dict[str, tuple[int, int]]
    rank: int
    scale: float


def _modules(config: PeftConfig, model: Model, stem: str) -> list[_Module]:
    """Every module that the configuration adapts, targets in the order of the table; ``stem`` is where transformers has the layers."""
    found = []
    shapes = abstract_model(model.config)[1]
    for target, block in BLOCK_OF.items():
        _, d_in, d_out = shapes[f"layers/{block}/{target}/kernel"]
        for layer in range(model.config.num_layers):
            name = f"{stem}.layers.{layer}.{block}.{target}"
            if config.adapts(name):
                r = config.rank(name)
                shape = {"A": (r, d_in), "B": (d_out, r)}
                found.append(_Module(name, layer, target, shape, r, config.scale(name)))
    return found


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        why = (
            "has pickled weights only (refused; save it as safetensors)"
            if pickled
            else f"has no {WEIGHTS_FILE}"
        )
        raise InputError(f"{folder}: {why}")
    try:
        with safe_open(path, "numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no dict
        for name, kind in kinds.items():
            if kind not in STORED_DTYPES:
                raise InputError(f"{path}: tensor {name} has type {kind}; known: {', '.join(STORED_DTYPES)}")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged or truncated ({error})") from error


def _check_factors(
    factors: Mapping[tuple[str, str], np.ndarray], modules: list[_Module], where: Path
) -> None:
    """That every adapted module has both factors, in the shapes that fit the base."""
    for module in modules:
        for letter, shape in module.shape.items():
            name = f"{module.name}.lora_{letter}"
            found = factors.get((module.name, letter))
            if found is None:
                raise InputError(f"{where}: {name} is missing")
            if found.shape != shape:
                raise InputError(f"{where}: {name} has shape {found.shape}, the base wants {shape}")


def _stack(
    factors: Mapping[tuple[str, str], np.ndarray],
    modules: list[_Module],
    config: PeftConfig,
    model: Model,
    numbers: Sequence[int],
) -> Adapter:
    """Factors by module → an adapter of one rank and one scale for the layers ``numbers``, with zeros where a module has less."""
    init, n = config.changes_base, len(numbers)
    some = tuple(numbers) if n < model.config.num_layers else None
    widest, scale = max(m.rank for m in modules), max((m.scale for m in modules), key=abs)
    rank = 2 * widest if init else widest
    dtype = np.result_type(*(wide(tensor.dtype) for tensor in factors.values()))
    layers: dict[str, Any] = {}
    with Progress(f"what {init} took from the base", len(modules) if init else 0) as bar:
        for m in modules:
            block = layers.setdefault(BLOCK_OF[m.target], {})
            (_, d_in), (d_out, _) = m.shape["A"], m.shape["B"]
            if m.target not in block:
                shapes = {"a": (n, d_in, rank), "b": (n, rank, d_out)}
                block[m.target] = {name: np.zeros(shape, dtype) for name, shape in shapes.items()}
            pair = block[m.target]
            place = numbers.index(m.layer)
            share = m.scale / scale if scale else 1.0
            pair["a"][place, :, : m.rank] = factors[m.name, "A"].T
            pair["b"][place, : m.rank] = factors[m.name, "B"].T.astype(dtype) * share
            if init:
                path = f"layers/{BLOCK_OF[m.target]}/{m.target}/kernel"
                lost_a, lost_b = lost_factors(init, model, path, m.layer, m.rank, m.scale)
                pair["a"][place, :, widest : widest + m.rank] = lost_a
                pair["b"][place, widest : widest + m.rank] = -share * lost_b
                bar.advance()
    if init or len({(m.rank, m.scale) for m in modules}) > 1:
        return Adapter(layers, rank, alpha=scale * rank, numbers=some)
    return Adapter(layers, rank, config.alpha(modules[0].name), config.rslora, numbers=some)
