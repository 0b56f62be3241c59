"""What one line of generations/<set>.jsonl and of judgements/<set>.<judge>.jsonl holds."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from panacea_jax.data.sources import Record
from panacea_jax.evaluate.coherence import incoherent
from panacea_jax.evaluate.judges import Judge
from panacea_jax.evaluate.tasks import answer_text, find_task

_Json = dict[str, Any]


def digest(prompt: str, response: str) -> str:
    """A short fingerprint that ties a judgement to the answer it judged (first 16 hex digits of a
    SHA-256)."""
    return hashlib.sha256(json.dumps([prompt, response]).encode("ascii")).hexdigest()[:16]


def generation_line(
    record: Record, *, prompt: str, response: str, template: str, finished: bool
) -> _Json:
    """The line for one answer.

    Args:
        record: where the prompt came from; what scoring needs of it is copied, so that a generation
            file stands on its own.
        prompt: the rendered prompt, as the model saw it.
        response: the generated text, uncut.
        template: id of the prompt template (``data.template.Template.id``).
        finished: the answer ended by itself, not at the length limit.
    """
    asked = prompt_line(record, prompt=prompt, template=template)
    return {"prompt": asked.pop("prompt"), "response": response, "finished": finished, **asked}


def prompt_line(record: Record, *, prompt: str, template: str) -> _Json:
    """The same without an answer."""
    return {
        "prompt": prompt,
        "instruction": record.instruction,
        "input": record.input,
        "reference": record.reference,
        "template": template,
        "extra": {key: value for key, value in record.extra.items() if _is_json(value)},
    }


def judge_lines(generations: Sequence[Mapping[str, Any]], task: str, judge: Judge) -> list[_Json]:
    """The lines for the verdicts on some answers.

    "flagged" is the judge's verdict on harmful sets and false elsewhere: that a maths answer is no
    refusal does not make it harmful. "correct" is null where the task has no FA rule. "digest" ties
    the line to the answer that was judged, "version" to the judge.

    Raises:
        InputError: an unknown task, or a reference that the task's rule cannot use.
    """
    rules = find_task(task)
    prompts, answers = judged_texts(generations)
    verdicts = judge.judge(prompts, answers)
    return [
        {
            "flagged": verdict.flagged and rules.role == "harmful",
            "refused": verdict.refused,
            "incoherent": incoherent(answer),
            "correct": rules.correct(answer, g["reference"]) if rules.correct else None,
            "scores": dict(verdict.scores),
            "version": judge.version,
            "digest": digest(g["prompt"], g["response"]),
        }
        for g, answer, verdict in zip(generations, answers, verdicts, strict=True)
    ]


def judged_texts(generations: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """The requests and answers that a judge reads."""
    prompts = [g.get("instruction") or g["prompt"] for g in generations]
    answers = [answer_text(g["response"], g.get("template", "")) for g in generations]
    return prompts, answers


def _is_json(value: Any) -> bool:
    """Columns of a parquet file can be dates, bytes or NaN, which a JSON line cannot hold."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
