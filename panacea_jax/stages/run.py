"""The command ``run``: every stage of a recipe, each skipped when it is done already."""

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from panacea_jax.config import stage_config
from panacea_jax.defences.ascent import AUTO
from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges import make_judge
from panacea_jax.evaluate.tasks import set_names
from panacea_jax.parallel import processes
from panacea_jax.stages import lineage
from panacea_jax.stages.curve import check_curve, curve_stage
from panacea_jax.stages.generate import decisive_for_answers, eval_records, generate_stage
from panacea_jax.stages.heal import heal_stage
from panacea_jax.stages.held_out import decisive_for_choice, held_out_sets
from panacea_jax.stages.judge import judge_stage
from panacea_jax.stages.layers import layers_stage
from panacea_jax.stages.perplexity import has_answers, perplexity_stage
from panacea_jax.stages.phases import Phases
from panacea_jax.stages.streams import stage_records
from panacea_jax.stages.summary import show_summary, write_summary
from panacea_jax.stages.train import check_stage, decisive, train_stage
from panacea_jax.train.shared import Shared
from panacea_jax.train.watch import Profile
from panacea_jax.workdir import plain


def check_run(config: ConfigDict) -> None:
    """Find now what a later stage would stumble over after hours of training: settings that do not fit, sources that cannot be read.

    Raises:
        InputError: the first such thing.
    """
    main = stage_config(config, "finetune")
    start = lineage.named(main)
    if config.align.defence.name:
        align = stage_config(config, "align")
        aligned = lineage.named(align)
        stage_records(align, "align", check_stage(align, "align", aligned, "align."))
        merged = main.lora.policy == "merged"
        if start.full_parameters and not aligned.full_parameters and not merged:
            raise InputError(
                "config.train.full_parameters: cannot go on from an aligned adapter; set config.align.train.full_parameters too, or "
                "config.lora.policy = merged"
            )
    stage_records(main, "finetune", check_stage(main, "finetune", start))
    if config.heal.methods or config.heal.defence.name:
        heal = stage_config(config, "heal")
        if heal.train.full_parameters and not start.full_parameters:
            raise InputError(
                "config.heal.train.full_parameters: what fine-tuning leaves is an adapter; set config.train.full_parameters too"
            )
        # What fine-tuning leaves in the work directory is healed, not what it started from.
        left = dataclasses.replace(start, adapter="")
        if config.heal.methods:
            held_out_sets(heal, left)
        else:
            stage_records(heal, "heal", check_stage(heal, "heal", left, "heal."))
    set_names(config.eval.tasks)
    for spec in config.eval.tasks:
        eval_records(config, spec)
    if config.eval.tasks:
        make_judge(config)
    if config.generate.adapters:
        raise InputError(
            "config.generate.adapters: for `panacea generate` alone; `run` answers with what its stages leave"
        )
    check_curve(config)
    if config.eval.perplexity and not any(map(has_answers, config.eval.tasks)):
        raise InputError("config.eval.perplexity: no set of config.eval.tasks has answers")


def decisive_for_run(config: ConfigDict) -> dict[str, Any]:
    """What two runs of different outcome differ in: all that decides a file of any of the stages, as their manifests have it."""
    main, found = stage_config(config, "finetune"), {}
    several = bool(config.heal.methods)
    for stage in ("align", "finetune", "heal"):
        part = stage_config(config, stage)
        if part.defence.name or (stage == "heal" and several):
            found[stage] = decisive(part, lineage.named(part))
    found["answers"] = decisive_for_answers(main, lineage.named(main)) | {"generate.adapter": config.generate.adapter}
    judge = config.judge
    adapter = {"adapter": judge.adapter} if judge.adapter else {}
    found["judge"] = {"name": judge.name, "path": judge.path, "template": judge.template, **adapter}
    found["eval"] = {"perplexity": config.eval.perplexity, "every": config.eval.every}
    if several or AUTO in (config.defence.rho, config.heal.defence.rho):  # then held-out records choose
        found["choice"] = {"methods": config.heal.methods} | decisive_for_choice(config)
    return dict(plain(found))


def run_stages(
    config: ConfigDict,
    workdir: Path,
    profile: Profile | None = None,
    shared: Shared | None = None,
    quiet: bool = False,
    *,
    show_records: bool = False,
) -> Path:
    """align (if ``config.align.defence.name``) → finetune → heal (if a method is named, or several are) → generate and judge (if there are
    tasks) → perplexity (if ``config.eval.perplexity``) → layers (if the defence has an ε).

    Fine-tuning goes on from what alignment left. Ends with what came out, in ``WORKDIR/summary.json`` and, unless ``quiet``, printed;
    with the first answers of each set where ``show_records`` asks for texts of records.
    Returns the work directory. Runs that are handed one ``shared`` compile a step once.

    Raises:
        InputError, Preempted, Diverged: as the stages do.
    """
    check_run(config)
    phases = Phases(workdir)
    main = stage_config(config, "finetune")
    start = lineage.named(main)
    if config.align.defence.name:
        with phases("align"):
            aligned = train_stage(stage_config(config, "align"), workdir, "align", shared=shared)
        start = lineage.after_alignment(start, aligned, config.align.train.full_parameters)
    with phases("finetune"):
        train_stage(main, workdir, "finetune", start, shared=shared, profile=profile)
    if config.heal.methods or config.heal.defence.name:
        heal = stage_config(config, "heal")
        whole = heal.train.full_parameters
        left = lineage.to_heal(heal, workdir, lineage.Start(start.base, full_parameters=whole))
        with phases("heal"):
            if heal.heal.methods:
                heal_stage(heal, workdir, left)
            else:
                train_stage(heal, workdir, "heal", left, shared=shared)
    if config.eval.tasks:
        answering = lineage.to_answer(main, workdir, start)
        with phases("generate"):
            generate_stage(main, workdir, answering)
        with phases("judge"):
            processes.once(lambda: judge_stage(main, workdir))
        if config.eval.every:
            with phases("checkpoints"):
                curve_stage(main, workdir, start)
        if config.eval.perplexity:
            with phases("perplexity"):
                perplexity_stage(main, workdir, answering)
    if (workdir / "finetune" / "epsilon.safetensors").is_file():
        with phases("layers"):
            layers_stage([workdir])
    if processes.first():
        summary = write_summary(main, workdir, phases, show_records=show_records)
        if not quiet:
            show_summary(summary)
    return workdir
