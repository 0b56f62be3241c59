"""The command ``convert``: a base, with an adapter and an ε if given, or a GGUF file, as one Hugging Face folder."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from panacea_jax.errors import InputError
from panacea_jax.export import load_epsilon, save_model, stored_dtype, warn_if_bare
from panacea_jax.models import lora
from panacea_jax.models.adapter import Adapter
from panacea_jax.models.config import read_config
from panacea_jax.models.gguf import convert_gguf
from panacea_jax.models.hub import local_folder
from panacea_jax.models.model import load
from panacea_jax.models.peft import read_notes
from panacea_jax.parallel import make_mesh


def convert(
    config: ConfigDict, out: Path, epsilon: Path | None, gguf: Path | None = None
) -> Path:
    """Write ``config.model.path`` merged with the adapter ``config.lora.init_from`` (and with ``epsilon``, added to the adapter first),
    or the file ``gguf`` by itself.

    Raises:
        InputError: a folder that exists and is not empty, or as :func:`write_merged` and :func:`panacea_jax.models.gguf.convert_gguf`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out={out}: exists already and is not empty; nothing was written")
    if gguf is not None:
        if config.model.path or config.lora.init_from or epsilon is not None:
            raise InputError(
                "--gguf: is converted by itself; name its folder in config.model.path afterwards"
            )
        return convert_gguf(gguf, out)
    if not config.model.path:
        raise InputError("config.model.path is not set: give a Hugging Face folder or a hub id")
    mesh = make_mesh(**config.mesh)
    write_merged(config.model.path, config.lora.init_from, epsilon, out, mesh)
    return out


def write_merged(base: str, adapter: str, epsilon: Path | None, out: Path, mesh: Mesh) -> None:
    """Write a base with an adapter, if one is named, merged into it.

    The base is read in the dtype of its own config.json, merged in float32 and written back in that dtype.

    Args:
        base: Hugging Face folder or hub id.
        adapter: PEFT folder, or "".
        epsilon: exported ε that is added to the adapter first, or None.
        out: folder to write.
        mesh: devices to merge on.

    Raises:
        InputError: an ε without an adapter, of other shapes or applied already, anything about the inputs.
    """
    kept = stored_dtype(read_config(local_folder(base)))
    model = load(base, mesh=mesh, dtype="float32", weights_dtype=kept)
    params = lora.load(adapter, model, frozen=True) if adapter else None
    if adapter and epsilon is None:
        warn_if_bare(adapter, "merging")
    if epsilon is not None:
        if params is None:
            raise InputError(
                "--epsilon: needs the adapter that it belongs to in config.lora.init_from"
            )
        if read_notes(adapter).get("epsilon") == "applied":
            raise InputError(
                f"--epsilon={epsilon}: {adapter} is w + ε already (what runs deploy); leave --epsilon out"
            )
        params = _add(params, load_epsilon(epsilon), epsilon)
    save_model(model, params, out)


def _add(params: Adapter, epsilon: dict[str, Any] | Adapter, path: Path) -> Adapter:
    layers = epsilon.layers if isinstance(epsilon, Adapter) else epsilon
    shapes = jax.tree.map(jnp.shape, params.layers)
    same = getattr(epsilon, "numbers", None) == params.numbers
    if not same or jax.tree.map(jnp.shape, layers) != shapes:
        raise InputError(
            f"{path}: was made for an adapter of other shapes or layers than {params.targets}, r {params.rank}"
        )
    return dataclasses.replace(params, layers=jax.tree.map(jnp.add, params.layers, layers))
