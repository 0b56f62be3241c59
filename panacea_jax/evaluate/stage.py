"""The command ``judge``: a verdict for every answer, and ``scores.json``."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from panacea_jax.data.sources import parse
from panacea_jax.errors import InputError
from panacea_jax.evaluate import records
from panacea_jax.evaluate.judges import make_judge
from panacea_jax.evaluate.lines import judge_line
from panacea_jax.evaluate.scores import ScoredSet, score
from panacea_jax.evaluate.tasks import set_names
from panacea_jax.workdir import MANIFEST, read_manifest, write_text

# Verdicts between two flushes to disk.
CHUNK = 256


def judge_stage(config: ConfigDict, workdir: Path) -> Path:
    """Write ``WORKDIR/judgements/<set>.<judge>.jsonl`` and ``WORKDIR/scores.json``; returns the latter.

    Judging goes on where its files end; a verdict that belongs to another answer than the one on file is an error.

    Raises:
        InputError: no tasks, no generations yet, or files that do not belong together.
    """
    specs = list(config.eval.tasks)
    if not specs:
        raise InputError("config.eval.tasks is empty: name at least one TASK@WHERE")
    folder = workdir / "generations"
    if (folder / MANIFEST).is_file() and read_manifest(folder)["status"] != "done":
        raise InputError(f"{folder}: not finished yet; run `panacea generate` again to go on")
    judge = make_judge(config.judge.name)
    sets, templates = [], set()
    for name, spec in zip(set_names(specs), specs):
        source = folder / f"{name}.jsonl"
        if not source.is_file():
            raise InputError(
                f"{source}: no generations for {spec} yet; run `panacea generate` first"
            )
        generations = records.read(source)
        task = parse(spec).task
        digests = [records.digest(g["prompt"], g["response"]) for g in generations]
        path = workdir / "judgements" / f"{name}.{judge.name}.jsonl"
        with records.Writer(path, digests, key="digest") as writer:
            for start in range(writer.done, len(generations), CHUNK):
                chunk = generations[start : start + CHUNK]
                writer.append(*(judge_line(g, task, judge) for g in chunk))
        sets.append(ScoredSet(name, task, generations, records.read(path)))
        templates |= {g["template"] for g in generations}
    if len(templates) > 1:
        raise InputError(
            f"{folder}: made with several prompt templates ({', '.join(sorted(templates))})"
        )
    version = {"name": judge.name, "version": judge.version}
    result = score(sets, judge=version, template=templates.pop())
    write_text(workdir / "scores.json", json.dumps(result, indent=1) + "\n")
    return workdir / "scores.json"
