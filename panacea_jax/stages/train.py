"""The commands ``align``, ``finetune`` and ``heal``: from a configuration to a finished stage folder.

Each reads from top to bottom: data, model, trainable tree, steps (or the one shot of a method without steps), export. In order, a stage
that is done is skipped, one that has a checkpoint goes on from it, any other starts anew.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from panacea_jax.config import attack_of, make_defence
from panacea_jax.config.methods import in_one_form
from panacea_jax.data.batches import Stream
from panacea_jax.data.encode import Example
from panacea_jax.data.template import Template
from panacea_jax.defences import Ascent, Defence, Method
from panacea_jax.defences.ascent import AUTO
from panacea_jax.defences.protocol import check_packing, has_steps
from panacea_jax.disk import check_there, replacing
from panacea_jax.errors import InputError
from panacea_jax.export import (
    deployed,
    save_epsilon,
    save_model,
    save_record_weights,
    warn_if_bare,
    write_adapter,
)
from panacea_jax.healing.auto import ascend_auto, at_chosen_radius
from panacea_jax.healing.curve import write_radius
from panacea_jax.healing.sets import HeldOutSet
from panacea_jax.memory import forget_peak, peak_bytes
from panacea_jax.models.adapter import Adapter, layers_text
from panacea_jax.models.fused import choose_backend
from panacea_jax.models.model import Model
from panacea_jax.models.vocabulary import open_vocabulary
from panacea_jax.parallel import make_mesh, processes
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.progress import say
from panacea_jax.stages import lineage
from panacea_jax.stages.card import write_card
from panacea_jax.stages.held_out import (
    asked_in,
    budget_of,
    decisive_for_exam,
    fingerprint_of,
    held_out_sets,
    make_exam,
)
from panacea_jax.stages.lineage import Start
from panacea_jax.stages.rendering import make_template
from panacea_jax.stages.room import advised, keys_of_training, needed_by_a_step, warn_of_memory
from panacea_jax.stages.streams import make_streams, stage_inputs
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.goodput import Goodput, shares
from panacea_jax.train.held_out import HeldOut
from panacea_jax.train.loop import Result, finetune
from panacea_jax.train.loss_picture import plot_losses
from panacea_jax.train.once import apply_once
from panacea_jax.train.optimizer import learning_rate, optimizer_of
from panacea_jax.train.shared import Shared
from panacea_jax.train.trackers import Tracking, check_installed
from panacea_jax.train.watch import Profile
from panacea_jax.workdir import StageFolder, plain, read_manifest, run_id

# Which configuration sections decide the outcome of a stage: a change of any other may resume it.
DECISIVE = ("seed", "model", "lora", "data", "defence", "optimizer", "train", "export")
NEUTRAL = {"train": ("log_every", "cache_frozen"), "model": ("attention", "remat")}
# Keys that came later, with the value at which a stage does what it did before: work directories from then go on.
SINCE: dict[str, dict[str, object]] = {
    "defence": {
        "ascent_steps": 1, "masks": "mended", "rho_per_layer": "", "layer_file": "", "layer_seed": None, "tau": None, "rho_relative": None,
        "ceiling": None, "by_poison": False, "start": 0.0, "between": "reuse", "trusted": (), "trust": 1.0, "off": (),
        "keep": (), "constraint": "project", "slack": 0.05, "dual_rate": 10.0,
        "budget": None, "damping": None, "guarded": None, "rule": None, "compensate": None,
        "margin_benign": None, "margin_harmful": None, "depth": None, "refusal": None,
        "first_factor": None, "early_factor": None, "early_tokens": None, "prompts": None,
        "gamma": None, "safe": None, "weight": None, "merge": None, "k": None,
        "logit_rate": None, "weighting": None,
    },
    "train": {"accumulate": 1, "validate_every": 0, "patience": 0},
    "lora": {"rslora": False, "dropout": 0.0, "layers": ""},
    "data": {
        "format": "", "columns": (), "validation": 0.0, "max_cut": 1.0, "thinking": False, "date": "", "special_tokens": "text",
        "loss_on": "all",
    },
}  # fmt: skip


def check_stage(config: ConfigDict, name: str, start: Start, prefix: str = "") -> Method:
    """The defence of a stage, once the stage is known to make sense.

    Args:
        config: as the stage sees it (``stage_config``).
        name: align, finetune or heal.
        start: what it starts from.
        prefix: where the stage's keys stand in what the user wrote, e.g. ``"heal."``.

    Raises:
        InputError: a defence of another stage, one that cannot be packed, or keys that exclude each other.
    """
    defence = make_defence(config.defence, prefix)
    if name not in defence.stages:
        raise InputError(
            f"config.{prefix}defence.name = {config.defence.name}: acts at the stage {defence.stage}, not {name}"
        )
    if config.data.packing:
        check_packing(defence)
    try:
        defence.check(start.full_parameters)
    except InputError as error:  # it does not know where its section stands
        raise InputError(str(error).replace("config.", f"config.{prefix}", 1)) from error
    if start.full_parameters and config.lora.dropout:
        raise InputError(
            f"config.lora.dropout = {config.lora.dropout}: drops an adapter's inputs; config.{prefix}train.full_parameters has none"
        )
    if start.full_parameters and layers_text(config.lora.layers):
        raise InputError(
            f"config.lora.layers = {config.lora.layers}: layers of an adapter; config.{prefix}train.full_parameters has none"
        )
    merged = config.lora.policy == "merged" and name == "finetune"
    if start.full_parameters and start.adapter and not merged:
        raise InputError(
            "config.lora.init_from: cannot start all-parameter training from an adapter; merge it with `panacea convert`, or set "
            "config.lora.policy = merged"
        )
    return defence


def decisive(config: ConfigDict, start: Start) -> dict[str, Any]:
    """The part of the configuration that a stage's manifest is compared by, with what the stage starts from in its place."""
    part = {key: config[key] for key in DECISIVE}
    out = {k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in part.items()}
    out["model"]["path"], out["lora"]["init_from"] = start.base, start.adapter
    out["train"]["full_parameters"] = start.full_parameters
    out["lora"]["layers"] = layers_text(out["lora"]["layers"])
    out["defence"] = in_one_form(out["defence"])
    if out["defence"].get("aligned") == "":
        out["defence"]["aligned"] = start.aligned
    if attack := attack_of(config).decisive():
        out["attack"] = attack
    for section, since in SINCE.items():
        for key, before in since.items():
            if out[section].get(key) in (before, None):
                out[section].pop(key, None)
    return {
        k: {n: x for n, x in v.items() if n not in NEUTRAL.get(k, ())} if isinstance(v, dict) else v
        for k, v in out.items()
    }


def train_stage(
    config: ConfigDict,
    workdir: Path,
    name: str,
    start: Start | None = None,
    *,
    apart: Sequence[HeldOutSet] = (),
    shared: Shared | None = None,
    profile: Profile | None = None,
) -> Path:
    """Run ``align``, ``finetune`` or ``heal``; returns the folder of what is to be deployed.

    Args:
        config: as the stage sees it (``stage_config``).
        workdir: the work directory.
        name: of the stage.
        start: what it starts from; by default what the configuration says and, to heal, the work directory holds.
        apart: held-out sets that it is measured by, of which it is given no record; by default those of the configuration for a method that
            chooses by them, else none.
        shared: what it has in common with other runs.
        profile: steps to record with ``jax.profiler``.

    Raises:
        InputError: something in the configuration, its files or the work directory; to heal, also when there is nothing to.
        Preempted, Diverged: see :func:`panacea_jax.train.loop.finetune`.
    """
    # ---- what is asked for
    if start is None:
        start = lineage.named(config)
        if name == "heal":
            check_stage(config, name, start)
            start = lineage.to_heal(config, workdir)
    defence = check_stage(config, name, start).aligned_by(start.aligned)
    auto = getattr(defence, "rho", None) == AUTO
    apart = apart or (held_out_sets(config, start) if auto else ())
    made_by = decisive(config, start) | (decisive_for_exam(config) if auto else {})
    inputs = start.inputs() | stage_inputs(config, name, defence) | (fingerprint_of(apart) if apart else {})
    spent = Goodput()
    forget_peak()
    check_installed(config.track.to)
    tracking = Tracking(config.track.to, config.track.project, _flat(made_by))
    out = workdir / name / ("model" if start.full_parameters else "adapter")
    with StageFolder(workdir, name, made_by, inputs) as stage, contextlib.ExitStack() as stack:
        if stage.done:
            say(f"{stage.folder}: done already, skipped")
            if not start.full_parameters:
                warn_if_bare(out, "keeping")
            return out

        warn_of_memory(config, name, start, defence)
        needed = functools.partial(needed_by_a_step, config, start, defence)
        stack.enter_context(advised(name, keys_of_training(config, start, defence), needed))

        # ---- data, model
        opened = open_stage(config, workdir, name, start, defence, apart)
        start, template, streams, model, params = opened.start, opened.template, opened.streams, opened.model, opened.params
        if has_steps(defence):
            jax.eval_shape(defence.init, params)  # settings that do not fit the weights are found before anything is written
            stage.begin()
            result = _train(
                config, stage.folder, defence, opened,
                stay=checkpoint_spacing(config, streams["user"].steps_per_epoch) if name == "finetune" else 0,
                donate=start.full_parameters, shared=shared, profile=profile, tracking=tracking, spent=spent,
            )  # fmt: skip
            if processes.first():
                plot_losses(stage.folder)
            if auto:
                with spent("evaluate"):
                    exam = make_exam(config, apart, template, model)
                    result, radius = at_chosen_radius(result, defence, exam, budget_of(config))
                write_radius(radius, stage.folder)
        elif isinstance(defence, Ascent) and auto:
            with spent("evaluate"):
                exam = make_exam(config, apart, template, model)
                result, radius = ascend_auto(model, params, defence, streams, exam, budget_of(config))
            stage.begin()
            write_radius(radius, stage.folder)
        else:
            with spent("step"):
                result = apply_once(model, params, defence, streams)
            stage.begin()  # only now: the look at its input is over, which may have been found bad

        # ---- export
        with spent("save"):
            epsilon = export(config, stage.folder, start, result, defence.epsilon_mean(result.state))
            weights = defence.record_weights(result.state)
            if weights is not None:
                save_record_weights(weights, path := stage.folder / "record_weights.jsonl")
                say(f"{path}: the weight of each of the user's {len(weights)} records")
        report = defence.report(params, result.state)
        attention = choose_backend(config.model.attention, model.config, model.dtype, opened.mesh.devices.flat[0])  # fmt: skip
        outcome = {
            "base": start.base, "steps": result.steps, "compilations": result.compilations,
            "step_bytes": result.step_bytes, "warnings": list(result.warnings),
            "attention": f"{attention.name}: {attention.why}", "template": template.id,
            "records": {k: len(s.examples) for k, s in streams.items()},
            **({"steps_per_epoch": streams["user"].steps_per_epoch} if result.steps else {}),
            **({} if report is None else {"report": report}),
        }  # fmt: skip
        if processes.first():
            write_card(out, name, plain(made_by), inputs, outcome, epsilon)
        stage.finish(outcome | _spent(name, spent))
    return out


def _spent(name: str, spent: Goodput) -> dict[str, Any]:
    """What a stage took: said in a line, and for its manifest."""
    seconds, (most, of) = spent.seconds(), peak_bytes()
    say(f"{name}: {sum(seconds.values()):.1f} s: {shares(seconds)}; memory at most {most / 2**30:.2f} GiB of the {of}")
    return {"seconds": seconds, "peak_bytes": most, "peak_of": of}


class Opened(NamedTuple):
    """What a stage computes with; ``start`` is on the merged base where the adapter was merged first."""

    start: Start
    mesh: Mesh
    template: Template
    streams: dict[str, Stream]
    held_out: Sequence[Example]
    model: Model
    params: Any


def open_stage(
    config: ConfigDict, workdir: Path, name: str, start: Start, defence: Method, apart: Sequence[HeldOutSet] = ()
) -> Opened:  # fmt: skip
    """The data of a stage, and the model with the tree that it trains, as they are at step 0.

    Args:
        config: as the stage sees it (``stage_config``).
        workdir: the work directory.
        name: of the stage.
        start: what it starts from.
        defence: of the stage.
        apart: held-out sets of which it is given no record.

    Raises:
        InputError: a source, the base or the adapter cannot be used.
    """
    mesh = make_mesh(**config.mesh)
    _, tokenizer, vocab_size = open_vocabulary(start.base)
    template = make_template(config, tokenizer, workdir)
    rows = batch_rows(mesh) * config.train.accumulate
    streams, held_out = make_streams(config, name, defence, template, vocab_size, rows, asked_in(apart))
    if name == "finetune":
        start = lineage.merged_first(config, start, workdir)
    model, params = start.params(config, start.open_model(config, mesh))
    return Opened(start, mesh, template, streams, held_out, model, params)


def checkpoint_spacing(config: ConfigDict, steps_per_epoch: int) -> int:
    """Steps between two checkpoints of fine-tuning that answer too (``config.eval.every``); 0: none do."""
    return steps_per_epoch if config.eval.every < 0 else int(config.eval.every)


def steps_and_rate(config: ConfigDict, defence: Defence, streams: dict[str, Stream]) -> tuple[int, optax.Schedule]:
    """Steps of a stage, and the learning rate of each."""
    asked = defence.own_steps or config.train.steps
    steps = asked or config.train.epochs * streams["user"].steps_per_epoch
    o = config.optimizer
    return steps, learning_rate(o.learning_rate, steps, o.schedule, o.warmup_ratio)


def _train(
    config: ConfigDict,
    folder: Path,
    defence: Defence,
    opened: Opened,
    *,
    stay: int,
    donate: bool,
    shared: Shared | None,
    profile: Profile | None,
    tracking: Tracking,
    spent: Goodput,
) -> Result:
    """All steps of a stage, from its newest checkpoint on."""
    streams, held_out = opened.streams, opened.held_out
    every = config.train.validate_every or streams["user"].steps_per_epoch
    steps, rate = steps_and_rate(config, defence, streams)
    checkpoints = Checkpoints(
        folder / "checkpoints", config.checkpoint.every, config.checkpoint.keep, stay,
        run=run_id(read_manifest(folder)), on_damage=config.checkpoint.on_damage,
    )  # fmt: skip
    return finetune(
        opened.model, opened.params, defence, streams,
        optimizer=optimizer_of(config.optimizer, rate, defence), steps=steps, seed=config.seed, log_every=config.train.log_every,
        accumulate=config.train.accumulate, checkpoints=checkpoints, folder=folder, donate=donate,
        cache_frozen=config.train.cache_frozen,
        compiled=None if shared is None else shared.compiled, known=_known(config, opened, shared), profile=profile, learning_rate=rate,
        tracking=tracking, spike=config.watch.spike, spent=spent,
        held_out=HeldOut(held_out, config.train.batch_size, every, config.train.patience) if held_out else None,
    )  # fmt: skip


def _known(config: ConfigDict, opened: Opened, shared: Shared | None) -> dict[bytes, np.ndarray] | None:
    """What earlier runs left of the layers below the adapter, if there are such layers and may be such runs."""
    if shared is None or not isinstance(opened.params, Adapter) or not opened.params.lowest:
        return None
    base = dataclasses.replace(opened.start, adapter="").inputs() or opened.start.base  # a hub id has no files to hash
    return shared.kept.of((base, config.model.dtype, config.model.quantization, opened.params.lowest))


def _flat(made_by: dict[str, Any]) -> dict[str, Any]:
    """Settings that are set, by dotted key."""
    return {key: value for key, value in flatten_dict(made_by, sep=".").items() if value is not None}


def export(
    config: ConfigDict, folder: Path, start: Start, result: Result, epsilon_mean: Any = None
) -> str:
    """Write what is deployed (w + ε unless told otherwise), and ε, into the stage's folder; returns whether ε is "applied" or "left out",
    "" where there is none."""
    params, note = deployed(result, config.export.without_epsilon)
    check_there(folder)
    with replacing(folder / ("model" if start.full_parameters else "adapter")) as new:
        if start.full_parameters:
            save_model(result.model, params, new)
        else:
            write_adapter(result.model, params, new, start.base, note)
    for kind, epsilon in (("last", result.epsilon), ("mean", epsilon_mean)):
        if epsilon is not None:
            file = "epsilon.safetensors" if kind == "last" else "epsilon_mean.safetensors"
            save_epsilon(epsilon, folder / file, {"kind": kind, "defence": config.defence.name})
    return note.get("epsilon", "")
