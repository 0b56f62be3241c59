"""Stages of an experiment in a miniature world, one after the other; each is noted as the command line that does the same."""

import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from panacea_jax.config import get_config, validate
from panacea_jax.progress import say
from panacea_jax.stages.generate import generate_stage
from panacea_jax.stages.judge import judge_stage
from panacea_jax.stages.layers import layers_stage
from panacea_jax.stages.train import train_stage
from panacea_jax.worlds.miniature import SCALES, base_folder, eval_tasks, pretraining, settings

RUNNERS: Mapping[str, Callable[[ConfigDict, Path], Path]] = {
    "align": lambda config, workdir: train_stage(config, workdir, "align"),
    "finetune": lambda config, workdir: train_stage(config, workdir, "finetune"),
    "heal": lambda config, workdir: train_stage(config, workdir, "heal"),
    "generate": generate_stage,
    "judge": judge_stage,
    "layers": lambda config, workdir: layers_stage([workdir]),
}


class Experiment:
    """Runs stages in a world that was made, and notes each in its ``commands.sh``.

    Attributes:
        root: of the world. data: its files. base: its pre-trained base.
    """

    def __init__(self, root: Path, seed: int, scale: str = "miniature") -> None:
        self.root, self.data, self.base = root, root / "data", base_folder(root)
        self._steps = SCALES[scale].pretrain_steps
        self._common: dict[str, Any] = settings(seed) | {
            "data.num_examples": 0, "data.num_harmful": 0, "data.num_alignment": 0, "lora.rank": 8, "lora.alpha": 4,
            "checkpoint.every": 0, "checkpoint.keep": 1, "train.log_every": 20,
        }  # fmt: skip

    def __call__(
        self, stage: str, workdir: Path, values: Mapping[str, Any], model: Path | None = None
    ) -> float:
        """Run one stage; returns its seconds.

        Args:
            stage: one of ``RUNNERS``.
            workdir: its work directory.
            values: configuration keys beside those of the world.
            model: base; by default the world's own.
        """
        values = self._common | {"model.path": str(model or self.base)} | dict(values)
        config = get_config()
        config.update_from_flattened_dict(values)
        validate(config)
        say(f"$ panacea {stage} … --workdir={workdir}")
        flags = [f"--config.{key}={value}" for key, value in values.items()]
        with (self.root / "commands.sh").open("a", encoding="utf-8") as log:
            log.write(shlex.join(["panacea", stage, *flags, f"--workdir={workdir}"]) + "\n")
        start = time.perf_counter()
        RUNNERS[stage](config, workdir)
        return time.perf_counter() - start

    def pretrain(self) -> None:
        """From the untrained base to ``self.base``."""
        values = pretraining(self.data, self._steps)
        self("finetune", self.root / "base", values, model=self.root / "untrained")

    def evaluate(self, adapter: Path, workdir: Path) -> None:
        """Answers and scores of one model on the three test sets."""
        values = {"eval.tasks": eval_tasks(self.data), "generate.adapter": str(adapter)}
        self("generate", workdir, values)
        self("judge", workdir, values)
