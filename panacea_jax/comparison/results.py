"""What finished cells say: outcomes on each prompt, passes, time, memory; and their means over seeds, paired with SFT."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from panacea_jax.defences import DEFENCES
from panacea_jax.defences.protocol import passes_of
from panacea_jax.defences.spec import Stack
from panacea_jax.evaluate.intervals import bootstrap_mean, wilson
from panacea_jax.evaluate.judged import load_judged
from panacea_jax.evaluate.pairing import paired
from panacea_jax.evaluate.scores import checked_pairs, outcomes
from panacea_jax.evaluate.tasks import find_task
from panacea_jax.workdir import read_manifest

Json = dict[str, Any]
FIGURES = ("hs", "hs_plus", "fa", "benign")
EXTRA = ("harmful", "alignment", "benign")


class Measured(NamedTuple):
    """What one cell left.

    Attributes:
        events: by figure, what happened on each prompt: harmful answer (hs, hs_plus), right answer (fa), benign request answered.
        steps: by stage.
        passes: by stage, forward + backward passes over the whole stage.
        seconds: of the stages' steps, compilation left out; None where that was not to be told apart.
        step_bytes: memory of one device that the largest compiled step needs.
        extra_data: sources that the stages read besides the user's records, the attack's and the alignment stage's own.
    """

    events: Mapping[str, Sequence[bool]]
    steps: Mapping[str, int]
    passes: Mapping[str, float]
    seconds: float | None
    step_bytes: int
    extra_data: tuple[str, ...]

    def figures(self) -> dict[str, float]:
        """Percentages."""
        return {name: 100.0 * sum(hits) / len(hits) for name, hits in self.events.items()}


def measure(root: Path, folder: Path, judge: str) -> Measured:
    """Read one finished cell."""
    note = json.loads((folder / "cell.json").read_text())
    steps: dict[str, int] = {}
    passes: dict[str, float] = {}
    seconds: list[float | None] = []
    step_bytes, extra = 0, set()
    for stage, where in note["stages"].items():
        manifest = read_manifest(root / where)
        outcome = manifest["outcome"]
        steps[stage] = int(outcome.get("steps", 0))
        passes[stage] = steps[stage] * passes_per_step(manifest["config"]["defence"])
        step_bytes = max(step_bytes, int(outcome.get("step_bytes", 0)))
        own = "alignment" if stage == "align" else ""
        sources = {name: manifest["config"]["data"][name] for name in EXTRA if name != own}
        extra |= {name for name, source in sources.items() if source in manifest["inputs"]}
        if steps[stage]:
            seconds.append(_seconds(root / where, steps[stage]))
    known = [s for s in seconds if s is not None]
    total = sum(known) if len(known) == len(seconds) else None
    return Measured(
        events(folder, judge),
        steps,
        passes,
        total,
        step_bytes,
        tuple(n for n in EXTRA if n in extra),
    )


def passes_per_step(section: Mapping[str, Any]) -> float:
    """Of a defence as a manifest describes it."""
    kind = DEFENCES[section["name"]]
    lists = {field.name: section[field.name] for field in dataclasses.fields(kind)}
    defence = kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in lists.items()})
    return float(sum(passes_of(defence).values()))


def _seconds(stage: Path, steps: int) -> float | None:
    """Steps times their median duration over the logged stretches; the first stretch, which compiles, does not count."""
    lines = (stage / "metrics.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line)["step_seconds"] for line in lines[1:]]
    return steps * statistics.median(found) if found else None


def events(folder: Path, judge: str) -> dict[str, list[bool]]:
    """Outcomes by figure.

    HS and HS+ are of the first harmful set, FA of the first set with right answers. "Benign answered" is of the first set of the
    over-refusal kind (not refused), or else of the set with right answers whose name ends in ``benign`` (answered rightly).
    """
    judged = load_judged(folder)[judge]
    found: dict[str, list[bool]] = {}
    for s in judged.sets:
        happened = outcomes(
            find_task(s.task), checked_pairs(s, judged.judge, judged.template), judged.template
        )
        for figure in ("hs", "hs_plus"):
            if figure in happened:
                found.setdefault(figure, happened[figure])
        if "over_refusal" in happened:
            found.setdefault("benign", [not refused for refused in happened["over_refusal"]])
        if "fa" in happened:
            found.setdefault("benign" if s.name.endswith("benign") else "fa", happened["fa"])
    return {figure: found[figure] for figure in FIGURES if figure in found}


def over_seeds(cells: Mapping[int, Measured]) -> Json:
    """By figure: mean over seeds, its 95 % interval, the single values, and the worst.

    With one seed the interval is Wilson's, over its prompts. With more it is the bootstrap's, over seeds: prompts of one seed share a
    model, so they are no independent evidence of the method.
    """
    found: Json = {}
    for figure in next(iter(cells.values())).events:
        by_seed = {seed: cell.figures()[figure] for seed, cell in cells.items()}
        values = list(by_seed.values())
        hits = next(iter(cells.values())).events[figure]
        low, high = (
            bootstrap_mean(values)
            if len(values) > 1
            else (100 * x for x in wilson(sum(hits), len(hits)))
        )
        worst = max if figure in ("hs", "hs_plus") else min
        found[figure] = {"mean": statistics.fmean(values), "ci95": [low, high], "worst": worst(values),
                         "by_seed": {str(seed): value for seed, value in by_seed.items()}}  # fmt: skip
    return found


def row(method: Stack, ratio: float | None, cells: Mapping[int, Measured], sft: Mapping[int, Measured] | None) -> Json:  # fmt: skip
    """One line of the table.

    Args:
        method: what defended.
        ratio: poison ratio; None for the aligned model.
        cells: by seed.
        sft: SFT's cells of the same ratio, which costs are relative to and prompts are paired with.
    """
    any_cell = next(iter(cells.values()))
    found: Json = {
        "method": str(method) if ratio is not None else "aligned",
        "ratio": ratio,
        "seeds": list(cells),
        "figures": over_seeds(cells),
        "steps": dict(any_cell.steps),
        "passes": {stage: _per_step(any_cell, stage) for stage in any_cell.steps},
        "passes_to_sft": None,
        "time_to_sft": None,
        "step_bytes": max(cell.step_bytes for cell in cells.values()) or None,
        "extra_data": list(any_cell.extra_data),
        "against_sft": None,
    }
    if sft is not None:
        total = sum(sum(cell.passes.values()) for cell in cells.values())
        found["passes_to_sft"] = total / sum(sum(cell.passes.values()) for cell in sft.values())
        ours, theirs = ([cell.seconds for cell in group.values()] for group in (cells, sft))
        if None not in ours and None not in theirs:
            found["time_to_sft"] = sum(filter(None, ours)) / sum(filter(None, theirs))
        if cells is not sft:
            found["against_sft"] = {
                figure: dataclasses.asdict(paired([hit for s in cells for hit in cells[s].events[figure]],
                                      [hit for s in cells for hit in sft[s].events[figure]]))
                for figure in any_cell.events
            }  # fmt: skip
    return found


def _per_step(cell: Measured, stage: str) -> float:
    return cell.passes[stage] / cell.steps[stage] if cell.steps[stage] else 0.0
