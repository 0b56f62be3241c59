"""The commands ``align``, ``finetune`` and ``heal``: from a configuration to a finished stage folder.

Each reads from top to bottom: data, model, trainable tree, steps (or the one shot of a method without steps), export. In order, a stage
that is done is skipped, one that has a checkpoint goes on from it, any other starts anew.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from panacea_jax.config import make_defence
from panacea_jax.convert import convert
from panacea_jax.data.batches import Stream
from panacea_jax.data.template import template_id
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.defences import Defence, Method, Sft
from panacea_jax.defences.protocol import check_packing
from panacea_jax.errors import InputError
from panacea_jax.export import WITHOUT_EPSILON, epsilon_note, save_epsilon, save_model
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.fused import choose
from panacea_jax.models.model import Model, load
from panacea_jax.models.peft import save_adapter
from panacea_jax.parallel import make_mesh, processes
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.progress import say
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.loop import Result, finetune
from panacea_jax.train.once import apply_once
from panacea_jax.train.optimizer import learning_rate, optimizer_of
from panacea_jax.train.records import make_streams, stage_inputs
from panacea_jax.workdir import Stage, read_manifest, sha256_folder

# Which configuration sections decide the outcome of a stage: a change of any other may resume it.
DECISIVE = ("seed", "model", "lora", "data", "defence", "optimizer", "train", "export")
NEUTRAL = {"train": ("log_every",), "model": ("attention", "remat")}


def check_stage(config: ConfigDict, name: str, prefix: str = "") -> Method:
    """The defence of a stage, once the stage is known to make sense.

    Args:
        config: as the stage sees it (``stage_config``).
        name: align, finetune or heal.
        prefix: where the stage's keys stand in what the user wrote, e.g. ``"heal."``.

    Raises:
        InputError: a defence of another stage, one that cannot be packed, or keys that exclude each other.
    """
    defence = make_defence(config.defence, prefix)
    allowed = ("align", "finetune") if isinstance(defence, Sft) else (defence.stage,)
    if name not in allowed:
        raise InputError(
            f"config.{prefix}defence.name = {config.defence.name}: acts at the stage {defence.stage}, not {name}"
        )
    if config.data.packing:
        check_packing(defence)
    if check := getattr(defence, "check", None):
        try:
            check(config.train.full_parameters)
        except InputError as error:  # it does not know where its section stands
            raise InputError(str(error).replace("config.", f"config.{prefix}", 1)) from error
    merged = config.lora.policy == "merged" and name == "finetune"
    if config.train.full_parameters and config.lora.init_from and not merged:
        raise InputError(
            "config.lora.init_from: cannot start all-parameter training from an adapter; merge it with `panacea convert`, or set "
            "config.lora.policy = merged"
        )
    return defence


def decisive(config: ConfigDict) -> dict[str, Any]:
    """The part of the configuration that a stage's manifest is compared by."""
    part = {key: config[key] for key in DECISIVE}
    out = {k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in part.items()}
    return {
        k: {n: x for n, x in v.items() if n not in NEUTRAL.get(k, ())} if isinstance(v, dict) else v
        for k, v in out.items()
    }


def model_inputs(config: ConfigDict) -> dict[str, str]:
    """Fingerprints of the base folder and of the starting adapter.

    Raises:
        InputError: ``config.model.path`` is not set.
    """
    if not config.model.path:
        raise InputError("config.model.path is not set: give a Hugging Face folder or a hub id")
    inputs = {}
    folder = Path(config.model.path).expanduser()
    if folder.is_dir():
        inputs[str(folder)] = sha256_folder(folder, ("*.json", "*.safetensors"))
    if config.lora.init_from:
        inputs[config.lora.init_from] = sha256_folder(
            Path(config.lora.init_from), ("*.json", "*.safetensors")
        )
    return inputs


def open_mesh(config: ConfigDict) -> Mesh:
    """The devices as the configuration arranges them."""
    return make_mesh(**config.mesh)


def open_model(config: ConfigDict, mesh: Mesh | None = None) -> Model:
    """The base model, on the mesh of the configuration unless that is at hand."""
    return load(
        config.model.path,
        mesh=open_mesh(config) if mesh is None else mesh,
        dtype=config.model.dtype,
        weights_dtype="float32" if config.train.full_parameters else None,
        remat=config.model.remat,
        attention=config.model.attention,
        quantization=config.model.quantization,
    )


def start_params(config: ConfigDict, model: Model) -> tuple[Model, Any]:
    """The trainable tree at step 0, with the model as it goes with it."""
    if config.train.full_parameters:
        return full_parameters(model)
    if config.lora.init_from:
        return model, lora.load(config.lora.init_from, model)
    key = jax.random.key(config.seed)
    return model, lora.init(
        model, config.lora.rank, config.lora.alpha, config.lora.targets, key=key
    )


def merged_base(config: ConfigDict, workdir: Path) -> Path:
    """``WORKDIR/base/model``: the base with ``lora.init_from`` merged into it, written once for this and all later stages."""
    stage = Stage(workdir, "base", {"merged": config.lora.init_from}, model_inputs(config))
    folder = stage.folder / "model"
    if not stage.done:
        stage.begin()
        _clear(folder)
        convert(config, folder, None)
        stage.finish({})
    return folder


def base_of(config: ConfigDict, workdir: Path) -> str:
    """The base that the adapters of the work directory's stages finetune and heal belong to."""
    merged = workdir / "base" / "model"
    return str(merged) if (merged / "config.json").is_file() else config.model.path


def on_its_base(config: ConfigDict, workdir: Path) -> ConfigDict:
    """A configuration of finetune as it goes on once the adapter of ``lora.policy`` "merged" is part of the base."""
    if config.lora.policy != "merged" or not config.lora.init_from:
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.path, config.lora.init_from = str(merged_base(config, workdir)), ""
    return config


def train_stage(config: ConfigDict, workdir: Path, name: str) -> Path:
    """Run ``align``, ``finetune`` or (configured by ``heal_config``) ``heal``; returns the folder of what is to be deployed.

    Raises:
        InputError: something in the configuration, its files or the work directory.
        Preempted, Diverged: see :func:`panacea_jax.train.loop.finetune`.
    """
    # ---- what is asked for
    defence = check_stage(config, name)
    inputs = model_inputs(config) | stage_inputs(config, name, defence)
    stage = Stage(workdir, name, decisive(config), inputs)
    out = stage.folder / ("model" if config.train.full_parameters else "adapter")
    if stage.done:
        say(f"{stage.folder}: done already, skipped")
        return out

    # ---- data, model
    mesh = open_mesh(config)
    tokenizer = load_tokenizer(config.model.path)
    streams = make_streams(config, name, defence, tokenizer, batch_rows(mesh))
    if name == "finetune":
        config = on_its_base(config, workdir)
    model, params = start_params(config, open_model(config, mesh))
    if isinstance(defence, Defence):
        stage.begin()
        result = _train(config, stage.folder, defence, model, params, streams)
    else:
        result = apply_once(model, params, defence, streams)
        stage.begin()  # only now: the look at its input is over, which may have been found bad

    # ---- export
    export(config, stage.folder, result, getattr(result.state, "epsilon_mean", None))
    report = getattr(defence, "report", None)
    attention = choose(config.model.attention, model.config, model.dtype, mesh.devices.flat[0])
    stage.finish({
        "base": str(config.model.path), "steps": result.steps, "compilations": result.compilations,
        "step_bytes": result.step_bytes, "warnings": list(result.warnings),
        "attention": f"{attention.name}: {attention.why}", "template": template_id(config.data.template, tokenizer),
        "records": {k: len(s.examples) for k, s in streams.items()},
        **({} if report is None else {"report": report(params, result.state)}),
    })  # fmt: skip
    return out


def _train(
    config: ConfigDict,
    folder: Path,
    defence: Defence,
    model: Model,
    params: Any,
    streams: dict[str, Stream],
) -> Result:
    """All steps of a stage, from its newest checkpoint on."""
    asked = getattr(defence, "steps", config.train.steps)
    steps = asked or config.train.epochs * streams["user"].steps_per_epoch
    o = config.optimizer
    rate = learning_rate(o.learning_rate, steps, o.schedule, o.warmup_ratio)
    optimizer = optimizer_of(o, rate, defence)
    checkpoints = Checkpoints(
        folder / "checkpoints", config.checkpoint.every, config.checkpoint.keep
    )
    return finetune(
        model, params, defence, streams,
        optimizer=optimizer, steps=steps, seed=config.seed, log_every=config.train.log_every,
        checkpoints=checkpoints, folder=folder, donate=config.train.full_parameters,
    )  # fmt: skip


def export(config: ConfigDict, folder: Path, result: Result, epsilon_mean: Any = None) -> None:
    """Write what is deployed (w + ε unless told otherwise), and ε, into the stage's folder."""
    bare = config.export.without_epsilon and result.epsilon is not None
    if bare:
        logging.warning("%s", WITHOUT_EPSILON)
    params = result.params if bare else result.deployed
    if config.train.full_parameters:
        _clear(folder / "model")
        save_model(result.model, params, folder / "model")
    else:
        save_adapter(params, folder / "adapter", str(config.model.path), epsilon_note(result, bare))
    if result.epsilon is not None:
        defence = config.defence.name
        save_epsilon(
            result.epsilon, folder / "epsilon.safetensors", {"kind": "last", "defence": defence}
        )
        if epsilon_mean is not None:
            save_epsilon(
                epsilon_mean,
                folder / "epsilon_mean.safetensors",
                {"kind": "mean", "defence": defence},
            )


def _clear(folder: Path) -> None:
    """Remove what an earlier try, cut short, left of an export."""
    processes.once(lambda: shutil.rmtree(folder, ignore_errors=True))


def heal_config(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The configuration with what is to be healed: the adapter ``lora.init_from``, else what the work directory's fine-tuning left (its
    model or its adapter), else, with ``train.full_parameters``, ``model.path``.

    For a method that compares with the aligned model (Safe LoRA) also what makes that, if nothing is said of it: the adapter that this
    fine-tuning went on from.

    Raises:
        InputError: there is nothing to heal.
    """
    config = config.copy_and_resolve_references()
    tuned = workdir / "finetune"
    with config.unlocked():
        if config.lora.init_from:
            if not Path(config.lora.init_from).is_dir():
                raise InputError(f"config.lora.init_from = {config.lora.init_from}: no such folder")
        elif (tuned / "model" / "config.json").is_file():
            config.model.path, config.train.full_parameters = str(tuned / "model"), True
        elif (tuned / "adapter" / "adapter_config.json").is_file():
            if config.train.full_parameters:
                raise InputError(f"config.train.full_parameters: {tuned} holds an adapter")
            config.model.path = base_of(config, workdir)
            config.lora.init_from = str(tuned / "adapter")
            if config.defence.get("aligned") == "":
                start = read_manifest(tuned)["config"]["lora"]
                merged = start.get("policy") == "merged"  # then the base is the aligned model
                config.defence.aligned = "" if merged else start["init_from"]
        elif not config.train.full_parameters:
            raise InputError(
                f"{tuned}: nothing to heal there; run finetune first, or name an adapter in config.lora.init_from"
            )
    return config


def heal_stage(config: ConfigDict, workdir: Path) -> Path:
    """Run ``heal``: a post-fine-tuning defence on a finished adapter or model, see ``heal_config``; returns the folder to deploy.

    Raises:
        InputError, Preempted, Diverged: as ``train_stage``; also when there is nothing to heal.
    """
    check_stage(config, "heal")
    return train_stage(heal_config(config, workdir), workdir, "heal")
