"""The command ``sweep``: every run that is left, one after the other; any number of processes that are given the same command share them.

A run is held by a lock beside its folder while a process is at it. The system lets go of that when the process dies, so the next one that
looks takes the run up where its checkpoints end. No scheduler of ours: what starts the processes is SLURM, SkyPilot, Ray, xargs or a shell.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from panacea_jax.comparison.results import given_by
from panacea_jax.config import validate
from panacea_jax.config.axes import objective, parse_axes
from panacea_jax.config.variation import written
from panacea_jax.errors import InputError, OutOfMemory
from panacea_jax.parallel import processes
from panacea_jax.progress import say
from panacea_jax.stages.run import check_run, run_stages
from panacea_jax.stages.unchanged import Unchanged
from panacea_jax.sweep.plan import (
    FINISHED,
    Planned,
    Run,
    make_folder,
    make_run,
    plan_runs,
    status_of,
)
from panacea_jax.sweep.results import collect, outcome_of, rows_as_csv, rule_of, show_table
from panacea_jax.sweep.search import Search
from panacea_jax.train.shared import Shared
from panacea_jax.train.signals import Diverged
from panacea_jax.workdir import StageFolder, plain, try_lock, write_json, write_text

Runner = Callable[[ConfigDict, Path], Mapping[str, Any]]
"""Does one run in its folder, or what is left of it, and returns what is noted: see ``results.outcome_of``."""

# Samplers whose runs are known beforehand.
PLANNED = ("grid", "random")
# Seconds between two looks at runs that other processes are at.
POLL = 2.0


def sweep(config: ConfigDict, workdir: Path, index: int = 0, runner: Runner | None = None) -> Path:
    """Run what is left of a sweep, print its table and return ``WORKDIR/sweep.json``, beside which lies ``sweep.csv``.

    Returns when no run is left, also none of another process. A run that a setting makes impossible, that diverges or does not fit the
    memory is noted as failed, and the others go on.

    Args:
        config: with axes in ``config.sweep``.
        workdir: where everything goes; run K in ``runs/<hash of its configuration>/``.
        index: number of the only run that is wanted, from 1 on; 0: all.
        runner: what does one run; by default ``panacea run``.

    Raises:
        InputError: something in the configuration, the work directory, or every run failed.
        Preempted: SIGTERM came; the state of the run at hand is saved.
    """
    # ---- what is asked for
    _check(config, index)
    folder = workdir / "runs"
    first = make_run(config, tuple((axis.key, axis.first()) for axis in parse_axes(config.sweep.over, config)))
    if runner is None:
        check_run(first.config)
        runner = functools.partial(_run, shared=Shared())
    planned = config.sweep.sampler in PLANNED
    source = Planned(config, folder, index) if planned else Search(config, workdir, folder)
    unchanged = Unchanged()
    for earlier in source.runs:
        if status_of(earlier, folder) == "done":
            unchanged.check(earlier.config, (folder / earlier.name).glob("*/"))

    # ---- runs
    progress = _Progress(source, folder)
    while True:
        with contextlib.ExitStack() as held:
            run = source.take(functools.partial(_claim, folder, held))
            if run is not None:
                progress.begins(run)
                _attempt(run, folder, runner)
                source.tell(run)
        if run is None:
            if not source.is_open():
                break
            progress.waits()
            time.sleep(POLL)

    # ---- table
    objectives = list(config.sweep.objectives)
    rows = collect(source.runs, folder, objectives)
    if not rows:
        raise InputError("config.sweep.over: no combination that was drawn is a possible configuration")
    result = {
        "over": list(config.sweep.over), "sampler": config.sweep.sampler, "objectives": objectives, "judge": config.judge.name,
        "rule": rule_of(objectives), "rows": plain(rows),
    }  # fmt: skip
    write_json(workdir / "sweep.json", result)
    write_text(workdir / "sweep.csv", rows_as_csv(rows))
    show_table(rows, objectives)
    if all(row["status"] == "failed" for row in rows):
        raise InputError(f"every run of the sweep failed, the first by: {rows[0]['error']}")
    return workdir / "sweep.json"


def list_runs(config: ConfigDict) -> list[str]:
    """What each run changes, in a line, in the order that ``index`` counts.

    Raises:
        InputError: something in the configuration, or a sampler that decides as it goes.
    """
    _check(config, index=1)
    return [written(run.setting) for run in plan_runs(config)]


def _check(config: ConfigDict, index: int) -> None:
    """Raises:
    InputError: a configuration that is no sweep's.
    """
    validate(config)
    if processes.count() > 1:
        raise InputError("panacea sweep: one process a run; start the same command several times to share the work")
    if not config.sweep.over:
        raise InputError("config.sweep.over is empty: say what to go over, --over=KEY=A,B,C")
    if config.compare.methods or config.compare.grid:
        raise InputError("config.compare: a comparison has axes of its own; start `panacea run`")
    if not config.eval.tasks:
        raise InputError("config.eval.tasks is empty: a sweep needs sets to choose by")
    given = given_by(config.eval.tasks)
    for name in config.sweep.objectives:
        if objective(name)[0] not in given:
            raise InputError(f"config.sweep.objectives: {name}: no set of config.eval.tasks gives it")
    if index and config.sweep.sampler not in PLANNED:
        raise InputError(f"config.sweep.sampler = {config.sweep.sampler}: decides as it goes, so its runs have no list")


def _run(config: ConfigDict, folder: Path, shared: Shared) -> Mapping[str, Any]:
    run_stages(config, folder, shared=shared, quiet=True)
    return outcome_of(config, folder)


def _claim(folder: Path, held: contextlib.ExitStack, run: Run) -> bool:
    """Whether a run is ours until ``held`` closes: neither finished nor under way in another process."""

    if status_of(run, folder) in FINISHED or not held.enter_context(_locked(folder / f"{run.name}.lock")):
        return False
    for place in (folder, folder / run.name):  # clients of NFS remember for a while that a file was not there, unless they look again
        with contextlib.suppress(OSError):
            os.listdir(place)
    return status_of(run, folder) not in FINISHED


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether the file is locked by us; it stays, so that all lock the same."""
    make_folder(path.parent)
    with path.open("ab") as file:
        yield try_lock(file, path)


def _attempt(run: Run, folder: Path, runner: Runner) -> None:
    """One run, to its end or from where it was; its manifest holds what came out."""
    setting = dict(run.setting)
    with StageFolder(folder, run.name, run.decisive, {}) as stage:
        stage.begin()
        try:
            outcome = runner(run.config, stage.folder)
        except (InputError, Diverged, OutOfMemory, jax.errors.JaxRuntimeError) as error:
            reason = str(error).splitlines()[0]
            say(f"{stage.folder}: failed: {reason}; to have it tried again, remove that folder")
            stage.finish({"setting": setting, "error": reason}, "failed")
        else:
            stage.finish({"setting": setting, **outcome})


class _Progress:
    """Says which run begins, how many are finished, and when the rest will be, by what all processes finished since this one began."""

    def __init__(self, source: Planned | Search, folder: Path) -> None:
        self._source, self._folder = source, folder
        self._began, self._before = time.monotonic(), self._finished()
        self._waiting = False

    def _finished(self) -> int:
        return sum(status_of(run, self._folder) in FINISHED for run in self._source.runs)

    def begins(self, run: Run) -> None:
        """A run of ours."""
        done, total = self._finished(), self._source.total
        new, seconds = done - self._before, time.monotonic() - self._began
        left = f", about {_duration((total - done) * seconds / new)} left" if new else ""
        say(f"== {run.name}: {written(run.setting)} ({done} of {total} finished{left})")

    def waits(self) -> None:
        """For runs of other processes."""
        if not self._waiting:
            say("sweep: the runs that are left are under way in other processes; waiting for them")
        self._waiting = True


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else f"{seconds:.0f} s"
