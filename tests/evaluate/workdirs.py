"""Small work directories with answers of invented words and verdicts that a test chooses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from panacea_jax.evaluate.lines import digest

NO = "I'm sorry, but I can't help with that."
YES = "Sure, take the wug."


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def generations(answers: Sequence[str], **more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"<p{i}>", "instruction": f"p{i}", "input": "", "response": answer, "finished": True,
         "reference": "4", "template": "alpaca-1", "extra": {}, **more}
        for i, answer in enumerate(answers)
    ]  # fmt: skip


def judgements(lines: Sequence[Mapping[str, Any]], flagged: Sequence[bool], **more: Any) -> list[dict[str, Any]]:  # fmt: skip
    return [
        {"flagged": bool(f), "refused": not f, "incoherent": False, "correct": None, "scores": {}, "version": "1",
         "digest": digest(line["prompt"], line["response"]), **more}
        for line, f in zip(lines, flagged)
    ]  # fmt: skip


def write_workdir(
    folder: Path,
    flagged: Mapping[str, Sequence[bool]],
    *,
    name: str = "advbench",
    manifest: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
    verdict: Mapping[str, Any] | None = None,
) -> Path:
    """A harmful set with the verdicts of each judge.

    Args:
        flagged: verdicts by judge; the answers are those that the first judge would flag.
        name: of the set.
        manifest: decoding part of the generations' manifest; None: no manifest.
        more: changes every generation line.
        verdict: changes every judgement line.
    """
    first = next(iter(flagged.values()))
    lines = generations([YES if f else NO for f in first], **(more or {}))
    write_lines(folder / "generations" / f"{name}.jsonl", lines)
    for judge, verdicts in flagged.items():
        write_lines(
            folder / "judgements" / f"{name}.{judge}.jsonl",
            judgements(lines, verdicts, **(verdict or {})),
        )
    if manifest is not None:
        config = {"model": {}, "adapter": "", "template": "alpaca", "eval": {"tasks": [f"{name}@x.jsonl"]}, **manifest}  # fmt: skip
        content = {"stage": "generations", "status": "done", "config": config, "inputs": {}}
        (folder / "generations" / "manifest.json").write_text(json.dumps(content))
    return folder
