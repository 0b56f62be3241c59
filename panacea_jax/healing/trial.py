"""``pj.heal``: several methods on one finished model in memory, the best of them by held-out records."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from panacea_jax.data.batches import Stream, length_buckets
from panacea_jax.data.encode import encode_all
from panacea_jax.data.mixing import realignment
from panacea_jax.data.sources import Record
from panacea_jax.data.template import Template
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.defences import (
    DEFENCES,
    Antidote,
    Ascent,
    Defence,
    Method,
    RandomPerturbation,
    Realign,
)
from panacea_jax.defences.ascent import AUTO
from panacea_jax.defences.protocol import extra_data, hyper_parameters
from panacea_jax.defences.spec import Part
from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges import Judge, RefusalJudge
from panacea_jax.generate.ends import eos_ids
from panacea_jax.healing import table
from panacea_jax.healing.auto import ascend_auto
from panacea_jax.healing.choice import Budget
from panacea_jax.healing.methods import BRINGS, allowed, lacking
from panacea_jax.healing.radius import ChosenRadius
from panacea_jax.healing.sets import (
    Exam,
    HeldOutSet,
    answer,
    check_sets,
    make_probe,
    set_apart,
    without,
)
from panacea_jax.healing.table import Treated
from panacea_jax.models.adapter import Adapter, as_wide_as
from panacea_jax.models.model import Model
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.train.loop import Result, finetune
from panacea_jax.train.once import apply_once
from panacea_jax.train.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Healed:
    """What healing came to.

    Attributes:
        result: of the best method, as ``pj.export_adapter`` and ``pj.export_model`` take it; ``result.deployed`` are its weights.
        best: its line.
        rows: every line, the untreated model first.
        radii: by method, the curve of a radius that chose itself.
        budget: what healing was allowed to cost.
        data: which methods the data allows, in a sentence.
    """

    result: Result
    best: Treated
    rows: Sequence[Treated]
    radii: Mapping[str, ChosenRadius]
    budget: Budget
    data: str

    def show(self) -> None:
        """Print the table."""
        table.show_rows(self.rows, self.best, self.budget, table.lines_below(self.best, self.rows, self.data))


def heal(
    model: Model,
    params: Any,
    harmful: Sequence[Record],
    task: Sequence[Record] = (),
    *,
    benign: Sequence[Record] = (),
    refusals: Sequence[Record] = (),
    methods: Sequence[Method] = (),
    fa_budget: float = 0.01,
    benign_budget: float = 0.03,
    coherence_budget: float = 0.03,
    task_name: str = "pairs",
    held_out: float = 0.25,
    num_held_out: int = 64,
    new_tokens: int = 24,
    template: str = "alpaca",
    max_length: int = 256,
    batch_size: int = 8,
    learning_rate: float = 2e-4,
    seed: int = 0,
    judge: Judge | None = None,
) -> Healed:
    """Try methods on a finished adapter or model and take the best within the budgets.

    Part of the records is held out: no method is given them, and all are measured by them (``choice.RULE``). Where an ascent moves the
    weights, noise of the same norm is tried as well. A method that lacks data is left out, with the reason in its line.

    Args:
        model: the base; its weights are None where ``params`` holds all of them.
        params: the finished adapter, or all weights.
        harmful: the defender's harmful records, with answers.
        task: records of the user's task that are trusted.
        benign: requests that are to be answered.
        refusals: harmful requests with the refusals that are wanted.
        methods: of the stage heal; by default ascent in one step and, held by task and benign records, in eight, realignment, Antidote.
        fa_budget, benign_budget, coherence_budget: shares of right, benign and coherent answers that may be lost (0.01 is one point).
        task_name: what makes a task's answer right, a name of ``evaluate.tasks.TASKS``.
        held_out: share of harmful, task and benign records held out, of each at most ``num_held_out``.
        new_tokens: tokens of an answer to harmful and benign requests.
        template: "alpaca", or "chat" for the tokenizer's own.
        max_length: tokens that a record is cut to.
        batch_size: records of a batch.
        learning_rate: of methods with steps, with AdamW's defaults.
        seed: of the order of records.
        judge: of harmful answers; by default refusal phrases.

    Raises:
        InputError: too few records, records that the model or template has no form for, or a method of another stage.
    """
    given = {"harmful": harmful, "alignment": refusals, "benign": benign, "user": task}
    there = [name for name, records in given.items() if records]
    budget = Budget(100 * fa_budget, 100 * benign_budget, 100 * coherence_budget)
    tasks = {"harmful": "pairs:harmful", "user": task_name, "benign": "pairs:benign"}
    sets = [
        HeldOutSet(as_task, set_apart(given[name], held_out, num_held_out, "held_out"))
        for name, as_task in tasks.items()
        if given[name]
    ]
    check_sets(sets, "harmful")
    if model.folder is None:
        raise InputError("heal: the model did not come from a folder, so there is no tokenizer")
    form = Template(template, load_tokenizer(model.folder))
    probes = [make_probe(s, form, model.config.vocab_size, max_length, new_tokens) for s in sets]
    exam = Exam(probes, form, judge or RefusalJudge(), eos_ids(form, model.folder), batch_size)
    asked = {one for s in sets for one in s.prompts}
    at_hand = {name: without(given[name], asked) for name in there}

    def stream(name: str, records: Sequence[Record], shuffle: bool = True) -> Stream:
        examples = encode_all(records, form, max_length, name)
        buckets, rows = length_buckets(max_length), batch_rows(model.mesh)
        return Stream(name, examples, batch_size, seed, shuffle, buckets, True, rows)

    def treat(method: Method) -> tuple[Result, ChosenRadius | None]:
        streams = {name: stream(name, at_hand[name]) for name in method.streams}
        if isinstance(method, Defence):
            steps = method.own_steps
            mix = realignment(
                at_hand.get("alignment", []), at_hand.get("benign", []), steps * batch_size, method.benign_share or 0.0, seed, True
            )  # fmt: skip
            streams["user"] = stream("user", mix, shuffle=False)
            tail = {"optimizer": make_optimizer(learning_rate), "steps": steps, "seed": seed}
            return finetune(model, params, method, streams, **tail), None
        if isinstance(method, Ascent) and method.rho == AUTO:
            return ascend_auto(model, params, method, streams, exam, budget)
        return apply_once(model, params, method, streams), None

    results = {table.UNTREATED: Result(model, params, None, params, (), 0, (), 0)}
    seconds: dict[str, float] = {}
    radii: dict[str, ChosenRadius] = {}
    left_out: list[Treated] = []
    todo = list(methods) or _defaults(there)
    control: Method | None = None
    for method in todo:
        name, began = method_name(method), time.perf_counter()
        if "heal" not in method.stages:
            raise InputError(f"heal: {name} acts at the stage {method.stage}")
        if needs := lacking(method, there):
            left_out.append(Treated(name, why=needs))
            continue
        if gone := [BRINGS[what] for what in extra_data(method) if not at_hand.get(what, True)]:
            left_out.append(Treated(name, why=f"all of the {' and '.join(gone)} ask what held-out ones do"))
            continue
        results[name], radius = treat(method)
        if radius is not None:
            radii[name] = radius
        if isinstance(method, Ascent) and control is None:
            length = float(optax.tree.norm(results[name].epsilon))
            if length > 0:
                todo.append(control := RandomPerturbation(rho=float(f"{length:.6g}")))
        seconds[name] = time.perf_counter() - began

    answered = answer(model, [r.deployed for r in results.values()], exam)
    rows = [
        Treated(name, found.figures, float(changed(r.deployed, params)), seconds.get(name))
        for (name, r), found in zip(results.items(), answered, strict=True)
    ] + left_out
    best = table.best_of(rows, budget)
    return Healed(results[best.method], best, rows, radii, budget, allowed(there))


@jax.jit
def changed(healed: Any, params: Any) -> Any:
    """‖healed − params‖ over all tensors together; what a wider adapter has besides counts from 0."""
    if isinstance(params, Adapter):
        params = as_wide_as(params, healed)
    return optax.tree.norm(jax.tree.map(lambda x, y: x - y, healed, params))


def method_name(method: Method) -> str:
    """A method as it is written in a line, with what differs from its own settings."""
    kind: Any = type(method)
    name = next(name for name, known in DEFENCES.items() if known is kind)
    defaults = hyper_parameters(kind)
    values = {key: getattr(method, key) for key in defaults}
    return str(Part(name, tuple((k, v) for k, v in values.items() if v != defaults[k])))


def _defaults(there: Sequence[str]) -> list[Method]:
    keep = tuple(name for name in ("user", "benign") if name in there)
    return [Ascent(), Ascent(steps=8, keep=keep), Realign(steps=50), Antidote()]
