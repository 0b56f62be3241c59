"""Answers in the shapes of other programs, as rows with a prompt and a response.

* HarmBench's completions and results: one JSON object, {BehaviorID: [{"test_case", "generation", perhaps "label"}, …]}.
* lm-eval's samples (``--log_samples``): JSON lines with "doc", "arguments" and "resps". A task with several filters has each answer as
  often; one is taken.
* TamperBench's folders: of one evaluation, ``evaluator_scores.parquet`` or, before it was scored, ``inferences.parquet``; of a checkpoint,
  a folder of such an evaluation each.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from panacea_jax.data.columns import read_columns
from panacea_jax.errors import InputError

# The first holds what the second does, and the score.
TAMPERBENCH_FILES = ("evaluator_scores.parquet", "inferences.parquet")
# Its evaluations whose prompts are a set that is known here.
TAMPERBENCH_SETS = {
    "strong_reject": "harmful:strongreject", "strong_reject_finetuned": "harmful:strongreject",
    "jailbreak_bench": "harmful:jailbreakbench", "xstest": "xstest",
}  # fmt: skip
SAMPLES = "samples_"
"""What the names of lm-eval's files begin with, before the task."""

_Row = Mapping[str, Any]


def tamperbench_files(folder: Path) -> list[Path]:
    """The answers of an evaluation's folder, or of the evaluations below it whose prompts are known; none in other folders."""
    if own := next((folder / name for name in TAMPERBENCH_FILES if (folder / name).is_file()), None):
        return [own]
    return [path for name in TAMPERBENCH_SETS if (folder / name).is_dir() for path in tamperbench_files(folder / name)]


def plain_rows(rows: Iterable[tuple[str, Any]], task: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of every answer: rows of the shapes above as others are, all others as they come.

    Args:
        rows: of a file, see ``data.files.file_rows``.
        task: whose columns lm-eval's "doc" may have; with a role or without.

    Raises:
        InputError: an answer that is no generated text, or several to one prompt.
    """
    seen: set[tuple[str, str, str]] = set()
    for place, row in rows:
        if _is_completions(row):
            yield from _completions(place, row)
        elif isinstance(row, dict) and "resps" in row and "arguments" in row:
            plain = _sample(place, row, task)
            asked = (str(row.get("doc_id")), plain["prompt"], plain["response"])
            if asked not in seen:
                seen.add(asked)
                yield place, plain
        else:
            yield place, row


def _is_completions(row: Any) -> bool:
    groups = list(row.values()) if isinstance(row, dict) else []
    lists = all(isinstance(g, list) and all(isinstance(x, dict) and "generation" in x for x in g) for g in groups)
    return lists and any(groups)


def _completions(place: str, row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    number = 0
    for behaviour, group in row.items():
        for one in group:
            number += 1
            rest = {key: value for key, value in one.items() if key not in ("test_case", "generation")}
            asked = {"prompt": one["test_case"]} if "test_case" in one else {}
            yield f"{place}: answer {number}", {**rest, **asked, "response": one["generation"], "BehaviorID": behaviour}


def _sample(place: str, row: _Row, task: str) -> dict[str, Any]:
    prompt, settings = _arguments(row["arguments"])
    answers = row["resps"][0] if isinstance(row["resps"], list) and row["resps"] else None
    if not isinstance(prompt, str) or not isinstance(answers, list) or not all(isinstance(a, str) for a in answers) or not answers:
        raise InputError(f"{place}: no text was generated here; lm-eval's samples of a task with output_type generate_until are read")
    if len(answers) > 1 or len(row["resps"]) > 1:
        raise InputError(f"{place}: holds several answers to one prompt; run lm-eval without repeats")
    plain: dict[str, Any] = {"prompt": prompt, "response": answers[0]}
    if isinstance(length := settings.get("max_gen_toks"), int):
        plain["max_new_tokens"] = length
    doc = row.get("doc")
    try:
        fields = read_columns(task.partition(":")[0], doc if isinstance(doc, dict) else {}, need_output=False)
    except InputError:  # a doc of other columns: the prompt is all that is known
        return plain
    known = {"instruction": fields.instruction, "input": fields.input, "reference": fields.reference}
    return {**fields.normalised, **plain, **known}


def _arguments(value: Any) -> tuple[Any, _Row]:
    """The prompt and the settings of a request, which are written as lists or, of late, as objects with numbered names."""
    first = next(iter(value.values()), None) if isinstance(value, dict) else value[0] if isinstance(value, list) and value else None
    parts = list(first.values()) if isinstance(first, dict) else list(first) if isinstance(first, list) else [first]
    settings = parts[1] if len(parts) > 1 and isinstance(parts[1], dict) else {}
    return (parts[0] if parts else None), settings
