"""The command ``run``: every stage of a recipe, each skipped when it is done already."""

from pathlib import Path

from ml_collections import ConfigDict

from panacea_jax.analysis.stage import layers_stage
from panacea_jax.config import stage_config
from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges import make_judge
from panacea_jax.evaluate.perplexity import has_answers, perplexity_stage
from panacea_jax.evaluate.stage import judge_stage
from panacea_jax.evaluate.tasks import set_names
from panacea_jax.generate.stage import eval_records, generate_stage
from panacea_jax.parallel import processes
from panacea_jax.progress import say
from panacea_jax.train.records import stage_records
from panacea_jax.train.stage import check_stage, heal_stage, train_stage


def check(config: ConfigDict) -> None:
    """Find now what a later stage would stumble over after hours of training: settings that do not fit, sources that cannot be read.

    Raises:
        InputError: the first such thing.
    """
    main = stage_config(config, "finetune")
    if config.align.defence.name:
        align = stage_config(config, "align")
        stage_records(align, "align", check_stage(align, "align", "align."))
        adapter = not align.train.full_parameters
        if main.train.full_parameters and adapter and main.lora.policy != "merged":
            raise InputError(
                "config.train.full_parameters: cannot go on from an aligned adapter; set config.align.train.full_parameters too, or "
                "config.lora.policy = merged"
            )
    stage_records(main, "finetune", check_stage(main, "finetune"))
    if config.heal.defence.name:
        heal = _heal_config(config, main)
        if heal.train.full_parameters and not main.train.full_parameters:
            raise InputError(
                "config.heal.train.full_parameters: what fine-tuning leaves is an adapter; set config.train.full_parameters too"
            )
        with heal.unlocked():
            heal.train.full_parameters = main.train.full_parameters
        stage_records(heal, "heal", check_stage(heal, "heal", "heal."))
    set_names(config.eval.tasks)
    for spec in config.eval.tasks:
        eval_records(spec, config.eval.num_examples)
    if config.eval.tasks:
        make_judge(config)
    if config.generate.adapters:
        raise InputError(
            "config.generate.adapters: for `panacea generate` alone; `run` answers with what its stages leave"
        )
    if config.eval.perplexity and not any(map(has_answers, config.eval.tasks)):
        raise InputError("config.eval.perplexity: no set of config.eval.tasks has answers")


def go_on_from(config: ConfigDict, aligned: Path, full_parameters: bool) -> None:
    """Let fine-tuning start at what alignment left: another base, or an adapter."""
    with config.unlocked():
        if full_parameters:
            config.model.path = str(aligned)
        else:
            config.lora.init_from = str(aligned)


def run(config: ConfigDict, workdir: Path) -> Path:
    """align (if ``config.align.defence.name``) → finetune → heal (if named) → generate and judge (if there are tasks) → perplexity (if
    ``config.eval.perplexity``) → layers (if the defence has an ε).

    Fine-tuning goes on from what alignment left. Returns the work directory. With ``config.compare.methods`` or ``.grid``, many such
    runs side by side, see ``panacea_jax.comparison``.

    Raises:
        InputError, Preempted, Diverged: as the stages do.
    """
    if config.compare.methods or config.compare.grid:
        from panacea_jax.comparison.run import compare_methods

        if processes.count() > 1:
            raise InputError(
                "config.compare: runs in one process; give each machine seeds of its own (docs/comparison.md)"
            )
        return compare_methods(config, workdir)
    check(config)
    main = stage_config(config, "finetune")
    if config.align.defence.name:
        say("== align")
        aligned = train_stage(stage_config(config, "align"), workdir, "align")
        go_on_from(main, aligned, config.align.train.full_parameters)
    say("== finetune")
    train_stage(main, workdir, "finetune")
    if config.heal.defence.name:
        say("== heal")
        heal_stage(_heal_config(config, main), workdir)
    if config.eval.tasks:
        say("== generate")
        generate_stage(main, workdir)
        say("== judge")
        processes.once(lambda: judge_stage(main, workdir))
        if config.eval.perplexity:
            say("== perplexity")
            perplexity_stage(main, workdir)
    if (workdir / "finetune" / "epsilon.safetensors").is_file():
        say("== layers")
        layers_stage(workdir, None, None)
    return workdir


def _heal_config(config: ConfigDict, main: ConfigDict) -> ConfigDict:
    """The healing stage's configuration: what fine-tuning leaves in the work directory is healed, not what it started from."""
    heal = stage_config(config, "heal")
    with heal.unlocked():
        heal.model.path, heal.lora.init_from = main.model.path, ""
    return heal
