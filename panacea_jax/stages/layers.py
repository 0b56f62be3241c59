"""The command ``layers``: layer safety coefficients of a run, a checkpoint or an exported ε; of several of them, one comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import unflatten_dict

from panacea_jax.analysis.layer_comparison import LayerRun, common_kinds, compare_runs, told_apart
from panacea_jax.analysis.layer_files import PROBE, write_coefficients, write_comparison
from panacea_jax.analysis.layers import layer_coefficients
from panacea_jax.errors import InputError
from panacea_jax.export import load_epsilon
from panacea_jax.parallel import processes
from panacea_jax.stores import by_address
from panacea_jax.train.checkpoints import newest_checkpoint, read_checkpoint
from panacea_jax.untrusted import parsing, read_json_value
from panacea_jax.workdir import MANIFEST, read_manifest


def from_workdir(workdir: Path) -> list[dict[str, Any]]:
    """Coefficients of the newest checkpoint of ``WORKDIR/finetune``; of its exported ε files when no checkpoint is left.

    Raises:
        InputError: there is no fine-tuning stage, or it has no ε.
    """
    folder = workdir / "finetune"
    if newest := newest_checkpoint(folder):
        return from_checkpoint(newest)
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
    params = subtree(arrays, "params.")
    scale = meta.get("lora_scale")  # absent in all-parameter mode
    numbers = meta.get("lora_layers")  # where not all layers are adapted
    for kind, name in (("last", "defence.epsilon."), ("mean", "defence.epsilon_mean.")):
        epsilon = subtree(arrays, name)
        if epsilon:
            results.append(layer_coefficients(epsilon, params if scale else None, scale, kind, numbers))
    if not results:
        raise InputError(f"{folder}: this checkpoint holds no ε (the defence has none)")
    return results


def subtree(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The arrays below a dotted prefix as a nested tree; an adapter's ``layers`` level is taken off."""
    tree = unflatten_dict(
        {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}, sep="."
    )
    return tree["layers"] if set(tree) == {"layers"} else tree


def layers_stage(
    workdirs: Sequence[Path],
    epsilons: Sequence[Path] = (),
    checkpoints: Sequence[Path] = (),
    *,
    labels: Sequence[str] = (),
    out: Path | None = None,
) -> Path:
    """Write ``layers.{json,csv,png}`` of one source, into the work directory or beside the file or checkpoint that was given; of several
    sources ``layers_compared.{json,csv,png}``, into the first's place.

    Args:
        workdirs: sources; with ``epsilons`` or ``checkpoints`` one at most, which then is only where the files go.
        epsilons: exported ε, in place of work directories.
        checkpoints: likewise.
        labels: names of the models that the sources are runs of, by default those of their bases.
        out: where the files go instead.

    Raises:
        InputError: not one kind of source, or one that cannot be read.
    """
    if epsilons and checkpoints:
        raise InputError("layers: give --epsilon or --checkpoint, not both")
    if len(workdirs) > 1 and (epsilons or checkpoints):
        raise InputError("layers: give several --workdir, or --epsilon or --checkpoint, not both")
    if missing := [path for path in epsilons if not path.is_file()]:
        raise InputError(f"--epsilon={missing[0]}: no such file")
    sources = list(epsilons or checkpoints or workdirs)
    if not sources:
        raise InputError("layers: give --workdir, --epsilon or --checkpoint")
    if labels and (len(labels) != len(sources) or len(sources) == 1):
        raise InputError(f"--label: {len(labels)} names for {len(sources)} sources; give one for each of several")  # fmt: skip
    home = workdirs[0] if workdirs else sources[0].parent
    if epsilons:
        found = [[layer_coefficients(load_epsilon(path))] for path in epsilons]
    elif checkpoints:
        found = [from_checkpoint(path) for path in checkpoints]
    elif len(sources) == 1:
        found = [from_workdir(sources[0])]
    else:
        found = [_trained_and_probed(path) for path in sources]
    folder = out or home
    # Of several processes all read, since orbax waits for all; the first writes.
    if len(sources) == 1:
        processes.once(lambda: write_coefficients(found[0], folder))
        return folder / "layers.json"
    names = labels or [_base_name(path) for path in sources]
    runs = [
        LayerRun(by_address(path), name, {result["epsilon"]: result for result in results})
        for path, name, results in zip(sources, names, found)
    ]
    runs = runs if labels else told_apart(runs)
    compared = [compare_runs(runs, kind) for kind in common_kinds(runs)]
    processes.once(lambda: write_comparison(compared, folder))
    return folder / "layers_compared.json"


def _trained_and_probed(workdir: Path) -> list[dict[str, Any]]:
    """Coefficients of what training left in a work directory, if it left an ε, and of the probe in it, if there is one."""
    probe = workdir / PROBE
    results = trained_coefficients(workdir) if probe.is_file() else from_workdir(workdir)
    return results + (read_probe(probe) if probe.is_file() else [])


def trained_coefficients(workdir: Path) -> list[dict[str, Any]]:
    """As :func:`from_workdir`; none where fine-tuning left no ε."""
    left = (workdir / "finetune" / "epsilon.safetensors").is_file()
    return from_workdir(workdir) if left else []


def read_probe(path: Path) -> list[dict[str, Any]]:
    """The coefficients in a layers_probe.json.

    Raises:
        InputError: it is none.
    """
    results: list[dict[str, Any]] = read_json_value(path, "not a probe of ours")
    with parsing(path, "not a probe of ours"):
        results[0]["epsilon"], results[-1]["probe"]["base"]
    return results


def _base_name(source: Path) -> str:
    """What the model of a source is called: the last part of its base's path, or its own folder where nothing names a base."""
    stages = source / "finetune", source.parent, source.parent.parent
    stage = next((s for s in stages if (s / MANIFEST).is_file()), None)
    if stage:
        base = str(read_manifest(stage)["config"]["model"]["path"])
    elif (source / PROBE).is_file():
        base = str(read_probe(source / PROBE)[-1]["probe"]["base"])
    else:
        return (source if source.is_dir() else source.parent).name
    return Path(base).name
