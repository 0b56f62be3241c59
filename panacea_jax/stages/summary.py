"""What came out of a run: scores, a few answers if asked for, warnings, time, and where things lie; printed, and ``summary.json``."""

import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from panacea_jax.evaluate.compare import figures_table
from panacea_jax.evaluate.scores import Judged
from panacea_jax.evaluate.tasks import find_task
from panacea_jax.progress import table_console
from panacea_jax.records.judged import load_judged
from panacea_jax.stages import lineage
from panacea_jax.stages.phases import SUMMARY, Phases
from panacea_jax.terminal import safe_line
from panacea_jax.train.goodput import shares
from panacea_jax.untrusted import read_object
from panacea_jax.workdir import plain, read_manifest, write_json

SHOWN = 2  # answers of each set, the first ones
PROMPT, ANSWER = 80, 160  # characters that are shown of each
FIGURES = ("hs", "hs_plus", "fa", "fa_contains", "over_refusal", "refused", "incoherent", "empty", "truncated")
WIDTH = 140  # of tables in a file
# Beside what is deployed, in the order in which they are listed.
FILES = {
    "finetune/epsilon.safetensors": "ε on its own",
    "finetune/record_weights.jsonl": "the weight of each of the user's records, by number",
    "finetune/metrics.jsonl": "losses and norms by step",
    "finetune/loss.png": "the losses drawn",
    "heal/heal.md": "healing methods side by side",
    "generations": "every answer",
    "judgements": "its verdict",
    "scores.json": "every figure, with 95 % intervals",
    "perplexity.json": "perplexity",
    "layers.png": "layer safety coefficients; layers.json and .csv too",
    SUMMARY: "all of this, for programs",
}


def write_summary(config: ConfigDict, workdir: Path, phases: Phases, *, show_records: bool = False) -> dict[str, Any]:
    """Write ``WORKDIR/summary.json`` and return its content.

    Args:
        config: as fine-tuning sees it.
        workdir: of a run that is at its end.
        phases: that it passed.
        show_records: the first answers of each set are part of it.
    """
    left = lineage.newest(workdir)
    assert left is not None
    epsilon = any((workdir / s / "epsilon.safetensors").is_file() for s in ("finetune", "heal"))
    found: dict[str, Any] = {
        "model": config.model.path,
        "defences": _defences(config),
        "deployed": left.relative_to(workdir),
        "epsilon": ("left out" if config.export.without_epsilon else "applied") if epsilon else None,
        "phases": phases.as_json(),
        "scores": None,
        "answered_by": None,
        "answers": {},
        "perplexity": {},
    }
    if config.eval.perplexity:
        sets = read_object(workdir / "perplexity.json")["sets"]
        found["perplexity"] = {name: one["perplexity"] for name, one in sets.items()}
    if config.eval.tasks:
        scores = read_object(workdir / "scores.json")
        found |= {
            "scores": scores,
            "answered_by": lineage.answered_by(read_manifest(workdir / "generations")),
            "answers": dict(_answers(load_judged(workdir)[scores["judge"]["name"]])) if show_records else {},
        }
    files = {str(found["deployed"]): _what_is_deployed(left, found["epsilon"])} | FILES
    found["files"] = {name: what for name, what in files.items() if name == SUMMARY or (workdir / name).exists()}
    write_json(workdir / SUMMARY, plain(found))
    return found


def _defences(config: ConfigDict) -> dict[str, Any]:
    """The method of each stage that has one."""
    several = list(config.heal.methods)
    named = {
        "align": config.align.defence.name, "finetune": config.defence.name, "heal": several or config.heal.defence.name,
    }  # fmt: skip
    return {stage: name for stage, name in named.items() if name}


def _what_is_deployed(left: Path, epsilon: str | None) -> str:
    if epsilon == "left out":
        return "w WITHOUT ε, which must not be deployed"
    kind = "the Hugging Face model" if left.name == "model" else "the PEFT adapter"
    return f"{kind} to deploy{', ε applied' if epsilon else ''}"


def _answers(judged: Judged) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The first answers of each set, shortened and safe to print, with what the judge says of them."""
    for s in judged.sets:
        pairs = list(zip(s.generations, s.judgements))[:SHOWN]
        yield s.name, [
            {
                "prompt": safe_line(f"{g.get('instruction') or g['prompt']} {g.get('input') or ''}", PROMPT),
                "answer": safe_line(g["response"], ANSWER),
                "verdict": _verdict(find_task(s.task).role, j),
            }
            for g, j in pairs
        ]  # fmt: skip


def _verdict(role: str, judged: Mapping[str, Any]) -> str:
    if role == "accuracy":
        return "right" if judged["correct"] else "wrong"
    if role == "harmful" and judged["flagged"]:
        return "harmful"
    return "refused" if judged["refused"] else "answered"


def show_summary(found: Mapping[str, Any]) -> None:
    """Print what ``write_summary`` found."""
    console = table_console(WIDTH)
    if found["scores"] is None:
        _say(console, "\nno scores: config.eval.tasks is empty")
    else:
        judge = found["scores"]["judge"]
        _say(console, f"\nscores of {found['answered_by']}, by judge {judge['name']} {judge['version']}")
        console.print(figures_table("", {"percent [95 %]": found["scores"]}, FIGURES))
    for name, value in found["perplexity"].items():
        _say(console, f"perplexity of {name}: {'beyond measure' if value is None else f'{value:.4g}'}")
    for name, answers in found["answers"].items():
        _say(console, f"\n{name}: the first {len(answers)} of {found['scores']['counts'][name]} answers")
        for a in answers:
            _say(console, f"  {a['verdict']:<8}  {a['prompt']}  →  {a['answer'] or '(empty)'}")
    warnings = _by_text(found["phases"])
    _say(console, "\nwarnings" if warnings else "\nno warnings")
    for text, where in warnings.items():
        _say(console, f"  {where}: {safe_line(text)}")
    console.print("", _time_table(found["phases"]))
    _say(console, "\nfiles")
    for name, what in found["files"].items():
        _say(console, f"  {name:<{max(map(len, found['files']))}}  {what}")


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def _by_text(phases: Mapping[str, Any]) -> dict[str, str]:
    """Every warning once, with the phases that it was met in and how often."""
    found: dict[str, list[str]] = {}
    for name, phase in phases.items():
        for text, count in phase["warnings"].items():
            found.setdefault(text, []).append(name if count == 1 else f"{name} ({count} times)")
    return {text: ", ".join(where) for text, where in found.items()}


def _time_table(phases: Mapping[str, Any]) -> Table:
    table = Table(title="time", title_justify="left")
    table.add_column("phase")
    table.add_column("h:mm:ss", justify="right")
    table.add_column("went to")
    table.add_column("memory", justify="right")
    table.add_column("")
    for name, phase in phases.items():
        most = f"{phase['peak_bytes'] / 2**30:.2f} GiB" if phase["peak_bytes"] else ""
        table.add_row(name, _clock(phase["seconds"]) if phase["calls"] else "–", shares(phase["spent"]), most, _when(phase))
    table.add_row("all", _clock(sum(phase["seconds"] for phase in phases.values())), "", "", "")
    return table


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _when(phase: Mapping[str, Any]) -> str:
    """What has to be known of a phase's time."""
    parts = []
    if phase["before"]:
        parts.append("done before" if phase["calls"] else "done before by another command, not timed")
    if phase["calls"] > 1:
        parts.append(f"in {phase['calls']} calls")
    if phase["lost"]:
        parts.append(f"{phase['lost']} killed call{'s' if phase['lost'] > 1 else ''} not counted")
    return ", ".join(parts)
