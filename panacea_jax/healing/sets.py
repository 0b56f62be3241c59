"""Held-out sets: a few records that no method has seen, their losses, and the answers of several models to them."""

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from panacea_jax.data.encode import Example, check_ids, encode, encode_prompt
from panacea_jax.data.mixing import held_out
from panacea_jax.data.sources import Record
from panacea_jax.data.template import Template
from panacea_jax.errors import InputError
from panacea_jax.evaluate.gate import kept
from panacea_jax.evaluate.judges import Judge
from panacea_jax.evaluate.lines import generation_line, judge_lines
from panacea_jax.evaluate.scores import ScoredSet, checked_pairs, outcomes
from panacea_jax.evaluate.tasks import find_task
from panacea_jax.generate.decode import generate
from panacea_jax.generate.schedule import common_prefix
from panacea_jax.healing.choice import Share
from panacea_jax.models import lora
from panacea_jax.models.adapter import Adapter
from panacea_jax.models.model import Model
from panacea_jax.progress import Progress
from panacea_jax.train.held_out import sum_nll

Asked = tuple[str, str]  # instruction and input: what tells one request from another
# Losses have the names of the figures of the same set.
KINDS = {"harmful": "hs", "accuracy": "fa", "generation": "fa", "over_refusal": "benign"}
# Adapters decoded side by side; the product with all of their ranks is computed for every row.
SIDE_BY_SIDE = 8


class HeldOutSet(NamedTuple):
    """Held-out records of one kind.

    Attributes:
        task: as scoring knows it, "sst2", "xstest", "pairs:harmful"; its role says what the answers are counted for.
        records: prompts, perhaps with answers.
    """

    task: str
    records: Sequence[Record]

    @property
    def prompts(self) -> set[Asked]:
        """What is asked in it."""
        return {(r.instruction, r.input) for r in self.records}


def set_apart(records: Sequence[Record], share: float, most: int, key: str) -> list[Record]:
    """The records of a set that are to be held out: evenly spread, at most ``most`` of them.

    Raises:
        InputError: too few records; ``key`` is that of the share.
    """
    return held_out(records, min(share, most / max(len(records), 1)), key)[1]


def without(records: Iterable[Record], prompts: Collection[Asked]) -> list[Record]:
    """Those that ask for something else than ``prompts`` do."""
    return [r for r in records if (r.instruction, r.input) not in prompts]


class Probe(NamedTuple):
    """A held-out set as a model reads it.

    Attributes:
        source: where it comes from.
        texts: its prompts, as people read them. ids: as the model does.
        examples: with their answers, of the records that have one.
        new_tokens: most tokens of an answer.
    """

    source: HeldOutSet
    texts: list[str]
    ids: list[list[int]]
    examples: list[Example]
    new_tokens: int


def make_probe(
    found: HeldOutSet, template: Template, vocab_size: int, max_length: int, new_tokens: int
) -> Probe:
    """A set, rendered and tokenised.

    Answers that a rule holds against the right one get as many tokens as the longest right one has, others ``new_tokens``: whether a
    request is refused shows at once.

    Raises:
        InputError: a record that the template has no form for, or with an id that the model does not know.
    """
    texts = [template.plain(template.prompt(r)) for r in found.records]
    ids = [encode_prompt(r, template) for r in found.records]
    whole = [encode(r, template, max_length, "last") for r in found.records if r.output]
    check_ids((*ids, *(e.tokens for e in whole)), vocab_size, f"held-out {found.task}")
    examples = [example for example in whole if example.has_target]
    if find_task(found.task).correct and examples:
        new_tokens = max(int(e.loss_mask.sum()) for e in examples)
    return Probe(found, texts, ids, examples, new_tokens)


class Exam(NamedTuple):
    """What a model is asked, and how its answers are read.

    Attributes:
        probes: held-out sets.
        template: of the prompts.
        judge: of harmful answers and refusals.
        eos_ids: any of these ends an answer.
        batch_size: rows decoded or scored together.
    """

    probes: Sequence[Probe]
    template: Template
    judge: Judge
    eos_ids: Sequence[int]
    batch_size: int


def losses(model: Model, params: Any, exam: Exam) -> dict[str, float]:
    """Mean loss in nats a token of the answers on file, by ``KINDS``; kinds without any are left out."""
    found = {}
    for kind in dict.fromkeys(KINDS.values()):
        probes = [p for p in exam.probes if KINDS.get(find_task(p.source.task).role) == kind]
        if examples := [e for p in probes for e in p.examples]:
            total, tokens = sum_nll(model, params, examples, exam.batch_size)
            found[kind] = total / tokens
    return found


class Answered(NamedTuple):
    """What one model answered: by probe a line a prompt, and the figures of all of them."""

    lines: list[list[dict[str, Any]]]
    figures: dict[str, Share]


def answer(model: Model, candidates: Iterable[Any], exam: Exam) -> Iterator[Answered]:
    """Greedy answers of several models to all probes, and what they come to.

    Args:
        model: the base.
        candidates: adapters of it, which are decoded side by side, or complete weights, one after the other.
        exam: what is asked.
    """
    for group in _groups(candidates):
        by_probe = [list(_lines(model, group, probe, exam)) for probe in exam.probes]
        for number in range(len(group)):
            lines = [of_candidate[number] for of_candidate in by_probe]
            yield Answered(lines, tally(lines, [p.source.task for p in exam.probes], exam))


def _lines(
    model: Model, group: Sequence[Any], probe: Probe, exam: Exam
) -> Iterator[list[dict[str, Any]]]:
    """By candidate, a line for each prompt of one probe."""
    params = lora.side_by_side(group) if len(group) > 1 else group[0]
    todo = list(itertools.product(range(len(group)), range(len(probe.ids))))
    found: dict[int, dict[str, Any]] = {}
    answers = generate(
        model, model.weights, params, [probe.ids[i] for _, i in todo], adapters=[a for a, _ in todo],
        batch_size=exam.batch_size, max_new_tokens=probe.new_tokens, eos_ids=exam.eos_ids, pad_id=0,
        shared=common_prefix(probe.ids) if len(group) == 1 else 0,
    )  # fmt: skip
    with Progress(f"answers to held-out {probe.source.task}", len(todo)) as bar:
        for number, tokens, finished in answers:
            i = todo[number][1]
            found[number] = generation_line(
                probe.source.records[i], prompt=probe.texts[i], template=exam.template.id, finished=finished,
                response=exam.template.tokenizer.decode(tokens, skip_special_tokens=True),
            )  # fmt: skip
            bar.advance()
    for start in range(0, len(todo), len(probe.ids)):
        yield [found[number] for number in range(start, start + len(probe.ids))]


def _groups(candidates: Iterable[Any]) -> Iterator[list[Any]]:
    """Adapters in groups, complete weights one by one."""
    rest = iter(candidates)
    for first in rest:
        more = itertools.islice(rest, SIDE_BY_SIDE - 1) if isinstance(first, Adapter) else ()
        yield [first, *more]


def tally(
    lines: Sequence[Sequence[dict[str, Any]]], tasks: Sequence[str], exam: Exam
) -> dict[str, Share]:
    """Answers as figures: "hs", "hs_plus", "fa", "benign" over the sets of that role, "coherence" over all answers."""
    hits: Counter[str] = Counter()
    totals: Counter[str] = Counter()

    def add(name: str, happened: Sequence[bool]) -> None:
        hits[name] += sum(happened)
        totals[name] += len(happened)

    judge, template = exam.judge, exam.template.id
    version = {"name": judge.name, "version": judge.version}
    for task, each in zip(tasks, lines, strict=True):
        judged = judge_lines(each, task, judge)
        pairs = checked_pairs(ScoredSet(task, task, each, judged), version, template)
        happened = kept(outcomes(find_task(task), pairs, template))
        for name in ("hs", "hs_plus", "fa", "benign", "coherence"):
            if name in happened:
                add(name, happened[name])
    return {name: Share(hits[name], n) for name, n in totals.items()}


def check_sets(sets: Sequence[HeldOutSet], key: str) -> None:
    """Raises:
    InputError: no harmful prompts are among them, without which nothing can be chosen; ``key`` is what names them.
    """
    if not any(find_task(s.task).role == "harmful" for s in sets):
        raise InputError(f"{key}: no harmful prompts are held out, so there is nothing to choose by")


def set_sizes(sets: Sequence[HeldOutSet]) -> Mapping[str, int]:
    """Records by task, for files."""
    found: Counter[str] = Counter()
    for s in sets:
        found[s.task] += len(s.records)
    return dict(found)
