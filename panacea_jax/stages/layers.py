"""The command ``layers``: layer safety coefficients of a run, a checkpoint or an exported ε."""

from pathlib import Path
from typing import Any

from flax.traverse_util import unflatten_dict

from panacea_jax.analysis.layers import layer_coefficients, write_coefficients
from panacea_jax.errors import InputError
from panacea_jax.export import load_epsilon
from panacea_jax.parallel import processes
from panacea_jax.train.checkpoints import read_checkpoint


def from_workdir(workdir: Path) -> list[dict[str, Any]]:
    """Coefficients of the newest checkpoint of ``WORKDIR/finetune``; of its exported ε files when no checkpoint is left.

    Raises:
        InputError: there is no fine-tuning stage, or it has no ε.
    """
    folder = workdir / "finetune"
    checkpoints = folder / "checkpoints"
    steps = sorted(int(p.name) for p in checkpoints.glob("*") if p.name.isdigit())
    if steps:
        return from_checkpoint(checkpoints / str(steps[-1]))
    files = [folder / f"epsilon{suffix}.safetensors" for suffix in ("", "_mean")]
    found = [
        layer_coefficients(load_epsilon(f), kind=k)
        for f, k in zip(files, ("last", "mean"))
        if f.is_file()
    ]
    if not found:
        raise InputError(
            f"{folder}: neither a checkpoint nor an epsilon.safetensors; run finetune with a defence that has an ε"
        )
    return found


def from_checkpoint(folder: Path) -> list[dict[str, Any]]:
    """Coefficients of the ε and the mean ε in one checkpoint folder (``…/checkpoints/<step>``).

    Raises:
        InputError: not a checkpoint, damaged, or of a defence without ε.
    """
    arrays, meta = read_checkpoint(folder)
    results = []
    params = _subtree(arrays, "params.")
    scale = meta.get("lora_scale")  # absent in all-parameter mode
    numbers = meta.get("lora_layers")  # where not all layers are adapted
    for kind, name in (("last", "defence.epsilon."), ("mean", "defence.epsilon_mean.")):
        epsilon = _subtree(arrays, name)
        if epsilon:
            results.append(layer_coefficients(epsilon, params if scale else None, scale, kind, numbers))
    if not results:
        raise InputError(f"{folder}: this checkpoint holds no ε (the defence has none)")
    return results


def _subtree(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The arrays below a dotted prefix as a nested tree; an adapter's ``layers`` level is taken off."""
    tree = unflatten_dict(
        {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}, sep="."
    )
    return tree["layers"] if set(tree) == {"layers"} else tree


def layers_stage(workdir: Path | None, epsilon: Path | None, checkpoint: Path | None) -> Path:
    """Write ``layers.{json,csv,png}``, into the work directory, or beside the file or checkpoint that was given.

    Raises:
        InputError: not exactly one source, or one that cannot be read.
    """
    if epsilon is not None and checkpoint is not None:
        raise InputError("layers: give --epsilon or --checkpoint, not both")
    if epsilon is not None:
        if not epsilon.is_file():
            raise InputError(f"--epsilon={epsilon}: no such file")
        results, home = [layer_coefficients(load_epsilon(epsilon))], epsilon.parent
    elif checkpoint is not None:
        results, home = from_checkpoint(checkpoint), checkpoint.parent
    elif workdir is not None:
        results, home = from_workdir(workdir), workdir
    else:
        raise InputError("layers: give --workdir, --epsilon or --checkpoint")
    # Of several processes all read, since orbax waits for all; the first writes.
    processes.once(lambda: write_coefficients(results, workdir or home))
    return (workdir or home) / "layers.json"
