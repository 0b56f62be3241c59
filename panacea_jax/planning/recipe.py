"""What a whole recipe takes on a machine that is not there: its steps and its answers, each at the least time that data sheets allow."""

import dataclasses
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from panacea_jax.config import defence_section, make_defence, stage_config
from panacea_jax.defences import Defence
from panacea_jax.defences.protocol import has_steps
from panacea_jax.defences.spec import parse_stack
from panacea_jax.evaluate.tasks import answer_length, set_names
from panacea_jax.models.families import config_from_folder
from panacea_jax.models.hub import local_folder
from panacea_jax.parallel.mesh import make_mesh, stand_ins
from panacea_jax.planning import cost_model
from panacea_jax.planning.abstract_step import AbstractStep, abstract_step
from panacea_jax.planning.plan import Plan
from panacea_jax.planning.topology import Topology

Counts = Mapping[str, int | None]
"""Records by "user", "alignment" and evaluation set; None where that is not known."""


@dataclasses.dataclass(frozen=True)
class RecipePhase:
    """A part of a recipe.

    Attributes:
        name: the stage, with the method or the evaluation set.
        work: how much there is to do, or why that is not counted.
        seconds: the least time of it; None where it is not counted.
    """

    name: str
    work: str
    seconds: float | None


def recipe_phases(config: ConfigDict, machine: Topology, counts: Counts, planned: Plan) -> list[RecipePhase]:
    """The stages and answers of a ``run``, in its order.

    Args:
        config: validated configuration.
        machine: as planned for.
        counts: how many records there are.
        planned: the plan to take, whose mesh, batch and remat policy the recipe gets.

    Raises:
        InputError: the model, or a mesh that does not divide the devices.
    """
    return list(_phases(_as_planned(config, planned), machine, counts, planned))


def _as_planned(config: ConfigDict, planned: Plan) -> ConfigDict:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh.update(planned.mesh)
        config.model.remat = planned.remat
        factor = planned.batch_size // config.train.batch_size
        for size in ("batch_size", "harmful_batch_size", "alignment_batch_size"):
            config.train[size] *= factor
    return config


def _phases(config: ConfigDict, machine: Topology, counts: Counts, planned: Plan) -> Iterator[RecipePhase]:
    if config.align.defence.name:
        yield _stage("align", stage_config(config, "align"), machine, counts)
    yield _stage("finetune", config, machine, counts, planned.step_seconds)
    heal = stage_config(config, "heal")
    if config.heal.methods:
        for text in config.heal.methods:
            part = parse_stack(str(text), "config.heal.methods").heal
            assert part is not None  # validated
            with heal.unlocked():
                heal.defence = defence_section(part)
            yield _stage("heal", heal, machine, counts)
    elif heal.defence.name:
        yield _stage("heal", heal, machine, counts)
    step = _step(config, machine)
    for name, spec in zip(set_names(config.eval.tasks), config.eval.tasks):
        yield _answers(f"generate {name}", spec, config, step, machine, counts[spec])


def _step(config: ConfigDict, machine: Topology) -> AbstractStep:
    model = config_from_folder(local_folder(config.model.path, ["config.json"]))
    devices = stand_ins(machine.size) if machine.devices is None else machine.devices
    mesh = make_mesh(**config.mesh, devices=devices)
    return abstract_step(config, model, mesh, None if machine.devices else machine.chip)


def _stage(
    stage: str, config: ConfigDict, machine: Topology, counts: Counts, step_seconds: float | None = None
) -> RecipePhase:
    """A stage that trains, from its configuration as it sees it (``stage_config``)."""
    name, defence = f"{stage} {config.defence.name}", make_defence(config.defence)
    if not has_steps(defence):
        return RecipePhase(name, "in one shot: not counted", None)
    steps = _steps(stage, config, defence, counts)
    if steps is None:
        return RecipePhase(name, f"how many records is not known: set config.{_counted(stage)}, or the number of steps", None)
    each = step_seconds or max(cost_model.seconds(_step(config, machine), machine.chip).values())
    return RecipePhase(name, f"{steps} steps of {each * 1e3:.1f} ms", steps * each)


def _counted(stage: str) -> str:
    return {"align": "data.num_alignment"}.get(stage, "data.num_examples")


def _steps(stage: str, config: ConfigDict, defence: Defence, counts: Counts) -> int | None:
    if asked := defence.own_steps or config.train.steps:
        return asked
    main = "alignment" if stage == "align" else "user"
    parts = [counts[name] for name in (main, *defence.mixed)]
    if None in parts:
        return None
    records = sum(n for n in parts if n is not None)
    if share := config.data.validation:
        records -= max(1, int(share * records))
    return config.train.epochs * -(-records // config.train.batch_size)


def _answers(
    name: str, spec: str, config: ConfigDict, step: AbstractStep, machine: Topology, count: int | None
) -> RecipePhase:
    """One evaluation set: prompts of ``data.max_length`` tokens, answers as long as they may be."""
    if count is None:
        return RecipePhase(name, "how many prompts is not known: set config.eval.num_examples", None)
    new, size = config.generate.max_new_tokens or answer_length(spec), config.generate.batch_size
    each = cost_model.answer_seconds(step, machine.chip, size, config.data.max_length, new)
    return RecipePhase(name, f"{count} answers of {new} tokens, {size} together", -(-count // size) * each)
