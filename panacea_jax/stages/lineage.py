"""What a stage starts from: the base, the adapter on it, or all weights. Decided here, once, from configuration and work directory."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from panacea_jax.disk import replacing
from panacea_jax.errors import InputError
from panacea_jax.export import warn_if_bare
from panacea_jax.models import lora
from panacea_jax.models.adapter import Adapter, layer_numbers, layers_text
from panacea_jax.models.full import full_parameters
from panacea_jax.models.hub import MODEL_FILES
from panacea_jax.models.model import Model, load
from panacea_jax.parallel import make_mesh
from panacea_jax.stages.convert import write_merged
from panacea_jax.stores import by_address, stand_in
from panacea_jax.sums import sha256_model
from panacea_jax.workdir import StageFolder, check_as_made, manifest_if_any, read_manifest

BARE_BASE = "none"
# Stages whose weights answer, the last one first.
_LAST_FIRST = ("heal", "finetune", "align")


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a stage starts.

    Attributes:
        base: Hugging Face folder or hub id.
        adapter: PEFT folder; "": a fresh one is trained, or the bare base answers.
        full_parameters: all weights are trained, hence kept in float32.
        aligned: what makes the aligned model, for methods that compare with that: an adapter of the base ("": the base is aligned), or with
            all parameters a model.
    """

    base: str
    adapter: str = ""
    full_parameters: bool = False
    aligned: str = ""

    def inputs(self) -> dict[str, str]:
        """Fingerprints of what is read, for the manifest.

        Raises:
            InputError: there is no base, or what another stage left is no longer as it made it.
        """
        if not self.base:
            raise InputError("config.model.path is not set: give a Hugging Face folder or a hub id")
        folder = stand_in(self.base, MODEL_FILES).expanduser()
        found = {by_address(folder): folder} if folder.is_dir() else {}
        if self.adapter:
            found[self.adapter] = stand_in(self.adapter)
        for path in found.values():
            check_as_made(path)
        return {name: sha256_model(path) for name, path in found.items()}

    def open_model(self, config: ConfigDict, mesh: Mesh | None = None) -> Model:
        """The base model, on the mesh of the configuration unless that is at hand."""
        return load(
            self.base,
            mesh=make_mesh(**config.mesh) if mesh is None else mesh,
            dtype=config.model.dtype,
            weights_dtype="float32" if self.full_parameters else None,
            remat=config.model.remat,
            attention=config.model.attention,
            quantization=config.model.quantization,
        )

    def params(self, config: ConfigDict, model: Model) -> tuple[Model, object]:
        """The trainable tree at step 0, with the model as it goes with it.

        Raises:
            InputError: the adapter cannot be used, or has other layers than the configuration asks for.
        """
        if self.full_parameters:
            return full_parameters(model)
        if self.adapter:
            loaded = lora.load(self.adapter, model)
            numbers = layer_numbers(config.lora.layers, model.config.num_layers)
            if layers_text(config.lora.layers) and numbers != loaded.numbers:
                raise InputError(
                    f"config.lora.layers = {config.lora.layers}: {self.adapter} adapts the layers {layers_text(loaded.adapted)}"
                )
            return model, dataclasses.replace(loaded, dropout=config.lora.dropout)
        key, o = jax.random.key(config.seed), config.lora
        return model, lora.init(
            model, o.rank, o.alpha, o.targets, key=key, rslora=o.rslora, dropout=o.dropout,
            layers=o.layers,
        )


def finished_adapter(folder: str, model: Model, done: str) -> Adapter:
    """An adapter that is not trained any more, with a warning if it is w without ε: "DONE w without ε"."""
    loaded = lora.load(folder, model, frozen=True)
    warn_if_bare(folder, done)
    return loaded


def named(config: ConfigDict) -> Start:
    """What the configuration itself says."""
    return Start(config.model.path, config.lora.init_from, config.train.full_parameters)


def after_alignment(start: Start, left: Path, full_parameters: bool) -> Start:
    """Fine-tuning goes on from what alignment left: another base, or an adapter."""
    if full_parameters:
        return dataclasses.replace(start, base=by_address(left))
    return dataclasses.replace(start, adapter=by_address(left))


def to_heal(config: ConfigDict, workdir: Path, start: Start | None = None) -> Start:
    """What is to be healed: the adapter that is named, else what the work directory's fine-tuning left (its model or its adapter), else,
    with all parameters, the base.

    For a method that compares with the aligned model (Safe LoRA, Safe Delta) also what makes that: the adapter, or with all parameters the
    model, that this fine-tuning went on from.

    Raises:
        InputError: there is nothing to heal, or fine-tuning is not done.
    """
    start, tuned = start or named(config), workdir / "finetune"
    if start.adapter:
        if not stand_in(start.adapter).is_dir():
            raise InputError(f"config.lora.init_from = {start.adapter}: no such folder")
        return start
    _refuse_unfinished(tuned)
    if _has_model(tuned):
        aligned = read_manifest(tuned).get("outcome", {}).get("base", "")
        return Start(by_address(tuned / "model"), full_parameters=True, aligned=aligned)
    if _has_adapter(tuned):
        if start.full_parameters:
            raise InputError(f"config.train.full_parameters: {tuned} holds an adapter")
        began = read_manifest(tuned)["config"]["lora"]
        merged = began.get("policy") == "merged"  # then the base is the aligned model
        aligned = "" if merged else began["init_from"]
        base = base_of_adapters(start.base, workdir)
        return Start(base, by_address(tuned / "adapter"), aligned=aligned)
    if not start.full_parameters:
        raise InputError(
            f"{tuned}: nothing to heal there; run finetune first, or name an adapter in config.lora.init_from"
        )
    return start


def to_answer(config: ConfigDict, workdir: Path, start: Start | None = None) -> Start:
    """Which weights answer.

    ``config.generate.adapter`` names a PEFT folder or "none"; left empty, the newest of the stages heal, finetune and align in the work
    directory counts (its ``model/`` in all-parameter mode, else its ``adapter/`` on the base that it was trained on), and without any
    the bare base.

    Raises:
        InputError: the named folder does not exist, or a later stage than that which would answer was begun and is not done.
    """
    start, adapter = start or named(config), config.generate.adapter
    bare = dataclasses.replace(start, adapter="")
    if adapter == BARE_BASE:
        return bare
    if adapter:
        if not stand_in(adapter).is_dir():
            raise InputError(f"config.generate.adapter = {adapter}: no such folder")
        return dataclasses.replace(start, adapter=adapter)
    left = newest(workdir)
    for stage in _LAST_FIRST[: _LAST_FIRST.index(left.parent.name) + 1 if left else None]:
        _refuse_unfinished(workdir / stage, ", or name in config.generate.adapter what is to answer")
    if left is None:
        return bare
    if left.name == "model":
        return dataclasses.replace(bare, base=by_address(left))
    base = start.base if left.parent.name == "align" else base_of_adapters(start.base, workdir)
    return dataclasses.replace(start, base=base, adapter=by_address(left))


def newest(workdir: Path) -> Path | None:
    """What the newest of the stages heal, finetune and align left in a work directory: its ``model`` or its ``adapter``."""
    for stage in _LAST_FIRST:
        folder = workdir / stage
        if _has_model(folder):
            return folder / "model"
        if _has_adapter(folder):
            return folder / "adapter"
    return None


def answered_by(manifest: Mapping[str, Any]) -> str:
    """The adapter or model whose answers a manifest of ``generations/`` is of; "" where it does not say."""
    config = manifest["config"]
    return str(config.get("adapter") or config.get("model", {}).get("path", ""))


def to_probe(config: ConfigDict, workdir: Path) -> Start:
    """What a probe looks at: the adapter that is named, else what answers in the work directory, else what training would begin with.

    Raises:
        InputError: an adapter, where the configuration is of all parameters.
    """
    start = named(config)
    start = start if start.adapter else to_answer(config, workdir, start)
    if start.full_parameters and start.adapter:
        raise InputError(f"config.train.full_parameters: {start.adapter} is an adapter")
    return start


def to_compare(config: ConfigDict, against: str, key: str) -> Start:
    """Another model of the same base: a PEFT folder on it, a Hugging Face folder, what answers in a work directory, or "none", the bare
    base.

    Args:
        config: of the model that it is compared with.
        against: which.
        key: what named it, for messages.

    Raises:
        InputError: nothing there, or adapters of another base.
    """
    base, folder = Start(config.model.path), stand_in(against)
    if against == BARE_BASE:
        return base
    if (folder / "adapter_config.json").is_file():
        return dataclasses.replace(base, adapter=against)
    if (folder / "config.json").is_file():
        return Start(against)
    start = to_answer(_without_adapter(config), folder, base)
    if start == base:
        raise InputError(f"{key}={against}: neither an adapter or a model, nor a work directory with one")
    if start.adapter:
        trained = str(read_manifest(stand_in(start.adapter).parent)["config"]["model"]["path"])
        if trained != base.base:
            raise InputError(f"{key}={against}: an adapter of {trained}, not of config.model.path = {base.base}")
    return start


def _without_adapter(config: ConfigDict) -> ConfigDict:
    """The configuration without ``generate.adapter``, which names one for the work directory at hand only."""
    config = config.copy_and_resolve_references()
    config.generate.adapter = ""
    return config


def base_of_adapters(base: str, workdir: Path) -> str:
    """The base that the adapters of the work directory's stages finetune and heal belong to."""
    merged = workdir / "base"
    return by_address(merged / "model") if _has_model(merged) else base


def _refuse_unfinished(stage: Path, instead: str = "") -> None:
    """Raises:
    InputError: the stage was begun and is not done: what it started from is not to pass for what it leaves.
    """
    if manifest_if_any(stage).get("status", "done") != "done":
        raise InputError(f"{stage}: not finished yet; run `panacea {stage.name}` again to go on{instead}")


def _has_model(stage: Path) -> bool:
    """Whether a stage's folder holds a whole model."""
    return (stage / "model" / "config.json").is_file()


def _has_adapter(stage: Path) -> bool:
    """Whether it holds an adapter."""
    return (stage / "adapter" / "adapter_config.json").is_file()


def merged_first(config: ConfigDict, start: Start, workdir: Path) -> Start:
    """With ``lora.policy`` "merged" the adapter becomes part of the base before fine-tuning: ``WORKDIR/base/model``, written once for this
    and all later stages."""
    if config.lora.policy != "merged" or not start.adapter:
        return start
    with StageFolder(workdir, "base", {"merged": start.adapter}, start.inputs()) as stage:
        folder = stage.folder / "model"
        if not stage.done:
            stage.begin()
            with replacing(folder) as new:
                write_merged(start.base, start.adapter, None, new, make_mesh(**config.mesh))
            stage.finish({})
    return dataclasses.replace(start, base=by_address(folder), adapter="")
