"""w alone, as what a defence is held against: a finished fine-tuning without its ε."""

from pathlib import Path

import jax
import jax.numpy as jnp

from panacea_jax.disk import replacing
from panacea_jax.errors import InputError
from panacea_jax.export import adapter_from_checkpoint, save_model, warn_of_bare
from panacea_jax.models.families import config_from_folder
from panacea_jax.models.hub import local_folder
from panacea_jax.models.model import load
from panacea_jax.models.peft import save_adapter
from panacea_jax.stages.layers import subtree
from panacea_jax.train.checkpoints import newest_checkpoint, read_checkpoint
from panacea_jax.workdir import read_manifest


def write_bare(stage: Path, out: Path) -> Path:
    """Write w of a finished stage, which must not be deployed, from its newest checkpoint; returns ``OUT/adapter`` or ``OUT/model``.

    Args:
        stage: its folder.
        out: the folder to write it into; what was there by that name is replaced.

    Raises:
        InputError: no checkpoint is left, or a damaged one.
    """
    manifest, newest = read_manifest(stage), newest_checkpoint(stage)
    if newest is None:
        raise InputError(f"{stage / 'checkpoints'}: no checkpoint is left, from which w alone is taken")
    base = str(manifest["outcome"]["base"])
    full = manifest["config"]["train"]["full_parameters"]
    folder = out / ("model" if full else "adapter")
    with replacing(folder) as new:
        if full:
            arrays, _ = read_checkpoint(newest)
            warn_of_bare("exporting w without ε")
            save_model(load(base), jax.tree.map(jnp.asarray, subtree(arrays, "params.")), new)
        else:
            nested = config_from_folder(local_folder(base)).nested
            save_adapter(adapter_from_checkpoint(newest), new, base, {"epsilon": "left out"}, nested=nested)
    return folder
