"""Checkpoints of one fine-tuning that answer too (``config.eval.every``): HS, FA and the rest over steps and epochs, without retraining.

Of each checkpoint what its own end would have left is exported (Panacea: w + ε) into ``WORKDIR/steps/<step>/``, which is a work directory
as any other.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from panacea_jax.config import make_defence
from panacea_jax.defences import Defence
from panacea_jax.defences.ascent import AUTO
from panacea_jax.errors import InputError
from panacea_jax.evaluate.scores import HEADLINES
from panacea_jax.parallel import processes
from panacea_jax.spreadsheet import as_csv_text
from panacea_jax.stages.generate import generate_stage
from panacea_jax.stages.judge import judge_stage
from panacea_jax.stages.lineage import Start
from panacea_jax.stages.rendering import of_one_day
from panacea_jax.stages.train import (
    Opened,
    checkpoint_spacing,
    decisive,
    export,
    open_stage,
    steps_and_rate,
)
from panacea_jax.train.checkpoints import PastCheckpoint, checkpoint_steps
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import optimizer_of
from panacea_jax.untrusted import read_object
from panacea_jax.workdir import StageFolder, read_manifest, run_id, write_json, write_text

CURVE = "curve.json"
_KEY = "config.eval.every"


def check_curve(config: ConfigDict) -> None:
    """Raises:
    InputError: checkpoints of this fine-tuning cannot answer.
    """
    if not config.eval.every:
        return
    for obstacle, there in (
        ("config.eval.tasks is empty", not config.eval.tasks),
        ("config.train.full_parameters: adapters alone answer side by side", config.train.full_parameters),
        ("config.generate.merge: several adapters cannot be merged into one base", config.generate.merge),
        ("config.defence.rho = auto chooses its radius after the last step", config.defence.rho == AUTO),
    ):
        if there:
            raise InputError(f"{_KEY} = {config.eval.every}: {obstacle}")


def curve_stage(config: ConfigDict, workdir: Path, start: Start, tuned: Path | None = None) -> Path:
    """Let the checkpoints of a finished fine-tuning answer, judge that, and write ``WORKDIR/curve.json`` and ``curve.csv``.

    Args:
        config: as fine-tuning sees it.
        workdir: the work directory.
        start: what fine-tuning started from.
        tuned: the folder of fine-tuning, by default ``WORKDIR/finetune``.

    Returns:
        curve.json: ``{"judge", "steps_per_epoch", "points": [{"step", "epoch", "hs", …, "ci95"}, …]}``, the figures as in scores.json, the
        last point after the last step.

    Raises:
        InputError: a checkpoint was not kept, or anything that the stages raise.
    """
    # ---- what is asked for
    tuned = tuned or workdir / "finetune"
    config, made = of_one_day(config, workdir), read_manifest(tuned)["outcome"]
    per_epoch, last = int(made.get("steps_per_epoch", 0)), int(made["steps"])
    spacing = checkpoint_spacing(config, per_epoch) or last
    steps = [*range(spacing, last, spacing), last]
    kept = checkpoint_steps(tuned / "checkpoints")  # which on gs:// are in the store alone
    for step in steps:
        if step not in kept:
            raise InputError(
                f"{_KEY} = {config.eval.every}: {tuned / 'checkpoints' / str(step)} was not kept, since fine-tuning was begun without "
                "that; choose another --workdir"
            )

    # ---- adapters, answers, verdicts
    places = {step: workdir / "steps" / str(step) for step in steps}
    opened: Opened | None = None
    for step, place in places.items():
        made_by = decisive(config, start) | {"step": step}
        with StageFolder(place, "finetune", made_by, start.inputs()) as stage:
            if not stage.done:
                opened = opened or _open(config, tuned, start)
                stage.begin()
                _export(config, stage.folder, opened, PastCheckpoint(tuned / "checkpoints", step, run_id(read_manifest(tuned))), step)
                stage.finish({"base": made["base"], "steps": step})
    with config.unlocked():
        config.generate.adapter = ""
        config.generate.adapters = tuple(f"{s}={p / 'finetune' / 'adapter'}" for s, p in places.items())
    generate_stage(config, workdir / "steps", Start(made["base"]))
    for place in places.values():
        processes.once(functools.partial(judge_stage, config, place))

    # ---- curve
    points = [{"step": step, "epoch": step / per_epoch} | _scores(place) for step, place in places.items()]
    if processes.first():
        write_json(workdir / CURVE, {"judge": config.judge.name, "steps_per_epoch": per_epoch, "points": points})
        write_text(workdir / "curve.csv", _as_csv(points))
    return workdir / CURVE


def _open(config: ConfigDict, tuned: Path, start: Start) -> Opened:
    return open_stage(config, tuned.parent, "finetune", start, make_defence(config.defence))


def _export(config: ConfigDict, folder: Path, opened: Opened, checkpoint: PastCheckpoint, step: int) -> None:
    """What training of so many steps leaves, from the checkpoint of its last one."""
    defence = make_defence(config.defence)
    assert isinstance(defence, Defence)  # or fine-tuning would have kept no checkpoint
    _, rate = steps_and_rate(config, defence, opened.streams)
    result = finetune(
        opened.model, opened.params, defence, opened.streams, optimizer=optimizer_of(config.optimizer, rate, defence), steps=step,
        seed=config.seed, accumulate=config.train.accumulate, checkpoints=checkpoint,
    )  # fmt: skip
    export(config, folder, opened.start, result, defence.epsilon_mean(result.state))


def _scores(place: Path) -> dict[str, Any]:
    scores = read_object(place / "scores.json")
    return {name: scores[name] for name in (*HEADLINES, "ci95")}


def _as_csv(points: Sequence[dict[str, Any]]) -> str:
    """A line a point; of FA a column a set."""
    flat = [
        {
            f"{name}_{key}" if key else name: value
            for name, found in point.items()
            if name != "ci95"
            for key, value in (found.items() if isinstance(found, dict) else [("", found)])
        }
        for point in points
    ]
    return as_csv_text([flat[0], *(line.values() for line in flat)])
