"""The command ``run``: every stage of a recipe, each skipped when it is done already."""

from pathlib import Path

from ml_collections import ConfigDict

from panacea_jax.analysis.stage import layers_stage
from panacea_jax.config import stage_config
from panacea_jax.evaluate.stage import judge_stage
from panacea_jax.generate.stage import generate_stage
from panacea_jax.progress import say
from panacea_jax.train.stage import heal_stage, train_stage


def run(config: ConfigDict, workdir: Path) -> Path:
    """align (if ``config.align.defence.name``) → finetune → heal (if named) → generate and judge (if there are tasks) → layers (if
    the defence has an ε).

    Fine-tuning goes on from what alignment left. Returns the work directory.

    Raises:
        InputError, Preempted, Diverged: as the stages do.
    """
    main = stage_config(config, "finetune")
    if config.align.defence.name:
        say("== align")
        aligned = train_stage(stage_config(config, "align"), workdir, "align")
        with main.unlocked():
            if config.align.train.full_parameters:
                main.model.path = str(aligned)
            else:
                main.lora.init_from = str(aligned)
    say("== finetune")
    train_stage(main, workdir, "finetune")
    if config.heal.defence.name:
        say("== heal")
        heal = stage_config(config, "heal")
        with heal.unlocked():
            heal.model.path = main.model.path
            heal.lora.init_from = ""
        heal_stage(heal, workdir)
    if config.eval.tasks:
        say("== generate")
        generate_stage(main, workdir)
        say("== judge")
        judge_stage(main, workdir)
    if (workdir / "finetune" / "epsilon.safetensors").is_file():
        say("== layers")
        layers_stage(workdir, None, None)
    return workdir
