"""Held-out records of the healing stage, as the configuration names or leaves them, and the exam that is made of them."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from panacea_jax.config import attack_of
from panacea_jax.data.sources import layout_of, load_records, parse_mixture, parse_source, take
from panacea_jax.data.template import Template
from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges import make_judge
from panacea_jax.evaluate.tasks import find_task
from panacea_jax.generate.ends import eos_ids
from panacea_jax.healing.choice import Budget
from panacea_jax.healing.sets import (
    Asked,
    Exam,
    HeldOutSet,
    check_sets,
    make_probe,
    set_apart,
    without,
)
from panacea_jax.models.model import Model
from panacea_jax.progress import say
from panacea_jax.stages import lineage
from panacea_jax.stages.lineage import Start
from panacea_jax.stages.streams import defender_records, honest_records
from panacea_jax.sums import sha256_json

_KEY, _SHARE = "config.heal.sets", "config.heal.held_out"


def held_out_sets(config: ConfigDict, start: Start) -> list[HeldOutSet]:
    """The sets of ``config.heal.sets``; without any, records set apart from the defender's own.

    Of ``data.harmful`` and ``data.benign`` the share ``heal.held_out``, never over ``heal.num_held_out`` records. Of ``data.user`` those
    that fine-tuning does not take (behind ``data.num_examples``, or that ``data.attack`` takes the place of); else its share, unless the
    weights come from a fine-tuning in the work directory, which has learnt them.

    Raises:
        InputError: a source that cannot be used, too few records, or no harmful prompts among them.
    """
    data, heal, layout = config.data, config.heal, layout_of(config.data)
    if heal.sets:
        loaded = [(spec, load_records(spec, _KEY, layout=layout)) for spec in heal.sets]
        sets = [
            HeldOutSet(parse_source(spec).scored_as, take(records, spec, heal.num_held_out))
            for spec, records in loaded
        ]
        if asked := [spec for spec in heal.sets if parse_source(spec).attacked]:
            raise InputError(f"{_KEY}: {asked[0]}: a defender does not know how the attacker asks")
        if empty := [spec for spec, found in zip(heal.sets, sets) if not found.records]:
            raise InputError(f"{_KEY}: {empty[0]} holds no record to answer")
        check_sets(sets, _KEY)
        return sets
    sets = [
        HeldOutSet(f"pairs:{name}", set_apart(defender_records(config, name), heal.held_out, heal.num_held_out, _SHARE))
        for name in ("harmful", "benign")
        if data[name]
    ]
    check_sets(sets, f"{_KEY} and config.data.harmful are not set")
    if task := _task_set(config, start):
        sets.append(task)
    else:
        say("heal: no right answers are watched: name a set in config.heal.sets whose records were not learnt")
    return sets


def _task_set(config: ConfigDict, start: Start) -> HeldOutSet | None:
    """Records of the user's task that fine-tuning has not learnt, if there are any."""
    data, heal = config.data, config.heal
    names = {parse_source(part).task for part, _ in parse_mixture(data.user)} if data.user else set()
    if len(names) != 1 or find_task(task := names.pop()).role not in ("accuracy", "generation"):
        return None
    records, attack = honest_records(config), attack_of(config)
    count = data.num_examples or len(records)
    learnt = int((1 - data.poison_ratio) * count) if data.attack and not attack.is_benign else count
    if spare := without(records[learnt:], HeldOutSet(task, records[:learnt]).prompts):
        return HeldOutSet(task, spare[: heal.num_held_out])
    if data.attack or attack.is_benign or start != lineage.named(config):
        return None
    return HeldOutSet(task, set_apart(records, heal.held_out, heal.num_held_out, _SHARE))


def asked_in(sets: Sequence[HeldOutSet]) -> frozenset[Asked]:
    """Every prompt of the sets, which no method is to be given."""
    return frozenset(asked for found in sets for asked in found.prompts)


def fingerprint_of(sets: Sequence[HeldOutSet]) -> dict[str, str]:
    """What a manifest says of them, among its inputs: prompts and right answers, since both decide."""
    records = [[found.task, *([r.turns, r.instruction, r.input, r.output, str(r.reference)] for r in found.records)] for found in sets]
    return {"held-out records": sha256_json(records)}


def decisive_for_exam(config: ConfigDict) -> dict[str, Any]:
    """What else decides a choice that is made by them."""
    adapter = {"adapter": config.judge.adapter} if config.judge.adapter else {}
    return {
        "budget": config.budget.to_dict(),
        "new_tokens": config.heal.new_tokens,
        "judge": {"name": config.judge.name, "path": config.judge.path, **adapter},
    }


def decisive_for_choice(config: ConfigDict) -> dict[str, Any]:
    """All that decides a choice by held-out records: which these are, and what they are asked."""
    return {key: config.heal[key] for key in ("sets", "held_out", "num_held_out")} | decisive_for_exam(config)


def budget_of(config: ConfigDict) -> Budget:
    """What healing may cost."""
    return Budget(**config.budget)


def make_exam(
    config: ConfigDict, sets: Sequence[HeldOutSet], template: Template, model: Model
) -> Exam:
    """The sets as a model reads them.

    Raises:
        InputError: a record that the template has no form for, or with an id that the model does not know.
    """
    judge = make_judge(config)
    judge.self_test()
    probes = [
        make_probe(found, template, model.config.vocab_size, config.data.max_length, config.heal.new_tokens)
        for found in sets
    ]
    return Exam(probes, template, judge, eos_ids(template, model.folder), config.generate.batch_size)
