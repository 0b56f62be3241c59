"""The command ``judge``: a verdict for every answer, and ``scores.json``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from panacea_jax.data.sources import parse_source
from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges import Judge, make_judge
from panacea_jax.evaluate.judges.reading import ModelJudge
from panacea_jax.evaluate.lines import digest, judge_lines, judged_texts
from panacea_jax.evaluate.scores import ScoredSet, score
from panacea_jax.evaluate.tasks import set_names
from panacea_jax.progress import Progress
from panacea_jax.records.jsonl import Writer, read_lines, resume
from panacea_jax.records.judged import (
    check_finished,
    one_template,
    read_decoding,
    read_generations,
)
from panacea_jax.stages.card import write_scores
from panacea_jax.stages.room import advised
from panacea_jax.sums import note_sums
from panacea_jax.workdir import check_as_made, write_json

# Answers judged between two flushes to disk: enough for full batches of any length.
FLUSHED_TOGETHER = 256


class _Set(NamedTuple):
    """One evaluation set: its answers, and the file of its verdicts."""

    name: str
    task: str
    generations: list[dict[str, Any]]
    digests: list[str]
    path: Path


def judge_stage(config: ConfigDict, workdir: Path, specs: Sequence[str] | None = None) -> Path:
    """Write ``WORKDIR/judgements/<set>.<judge>.jsonl``, ``WORKDIR/scores.<judge>.json`` and, as the latest word,
    ``WORKDIR/scores.json``; returns the last.

    Args:
        config: names the judge.
        workdir: the work directory.
        specs: TASK@WHERE of the sets; by default ``config.eval.tasks``.

    Judging goes on where its files end. Verdicts of other judges stay beside; a verdict on another answer than the one on file, or
    by another version of the judge, is an error.

    Raises:
        InputError: no tasks, no generations yet, files that do not belong together, or a judge that cannot be used.
    """
    # ---- what is asked for
    specs = list(config.eval.tasks if specs is None else specs)
    if not specs:
        raise InputError("config.eval.tasks is empty: name at least one TASK@WHERE")
    folder = workdir / "generations"
    check_finished(folder)
    sets = _read_sets(specs, workdir, config.judge.name)
    template = one_template(folder, [s.generations for s in sets])

    # ---- verdicts
    with advised("judge", "a smaller config.judge.batch_size"):
        judge = make_judge(config)
        pending = [_pending(s, judge.version) for s in sets]  # a look at all, before the first verdict
        if isinstance(judge, ModelJudge):
            for s, wanted in zip(sets, pending):
                if wanted:
                    judge.check(*judged_texts(s.generations), s.name)
        if any(pending):
            judge.self_test()
        for s in sets:
            _judge(s, judge)
    note_sums(workdir / "judgements", [s.path for s in sets])

    # ---- scores
    version = {"name": judge.name, "version": judge.version}
    scored = [ScoredSet(s.name, s.task, s.generations, read_lines(s.path)) for s in sets]
    result = score(scored, judge=version, template=template, decoding=read_decoding(folder))
    for name in (f"scores.{judge.name}.json", "scores.json"):
        write_json(workdir / name, result)
    write_scores(workdir, result)
    return workdir / "scores.json"


def _read_sets(specs: Sequence[str], workdir: Path, judge: str) -> list[_Set]:
    sets = []
    for name, spec in zip(set_names(specs), specs):
        source = workdir / "generations" / f"{name}.jsonl"
        if not source.is_file():
            raise InputError(
                f"{source}: no generations for {spec} yet; run `panacea generate` first"
            )
        task = parse_source(spec).scored_as
        generations = read_generations(source, task)
        if not generations:
            raise InputError(f"{source}: holds no record")
        check_as_made(source)
        digests = [digest(g["prompt"], g["response"]) for g in generations]
        path = workdir / "judgements" / f"{name}.{judge}.jsonl"
        sets.append(_Set(name, task, generations, digests, path))
    return sets


def _pending(s: _Set, version: str) -> bool:
    """Whether answers are left to judge, after a look at the verdicts that are there."""
    done = resume(s.path, s.digests, key="digest")
    for line in read_lines(s.path)[:done] if done else []:
        if line.get("version") != version:
            raise InputError(
                f"{s.path}: by version {line.get('version')} of the judge, not {version}; move it "
                "away to judge again"
            )
    return done < len(s.generations)


def _judge(s: _Set, judge: Judge) -> None:
    """Judge one set, from where its file ends."""
    total = len(s.generations)
    with (
        Writer(s.path, s.digests, key="digest") as writer,
        Progress(f"judge {s.name}", total, writer.done) as bar,
    ):
        # From the start of a chunk that a kill tore: the same batches give the same last digits.
        begin = writer.done // FLUSHED_TOGETHER * FLUSHED_TOGETHER if writer.done < total else total
        for start in range(begin, total, FLUSHED_TOGETHER):
            lines = judge_lines(s.generations[start : start + FLUSHED_TOGETHER], s.task, judge)
            new = lines[writer.done - start :]
            writer.append(*new)
            bar.advance(by=len(new))
