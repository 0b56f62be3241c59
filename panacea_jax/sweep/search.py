"""Runs that Optuna proposes, by what the finished ones gave: ``tpe`` and ``nsga2``.

The study lies in ``WORKDIR/study.journal``, where any number of processes append to it, and Optuna's own tools read it.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from panacea_jax.config.axes import Axis, objective, parse_axes
from panacea_jax.errors import InputError
from panacea_jax.parallel import processes
from panacea_jax.progress import say
from panacea_jax.stages.run import decisive_for_run
from panacea_jax.sums import sha256_json
from panacea_jax.sweep.plan import FINISHED, Run, make_folder, make_run, status_of
from panacea_jax.workdir import lock, plain, read_manifest

if TYPE_CHECKING:
    import optuna

MADE_BY = "made_by"
# NSGA-II's generations: a sixth of all runs, within these bounds (Optuna's own 50 would leave a short search at random).
POPULATION = (4, 50)


class Search:
    """Runs of a study that is shared.

    Only one process at a time looks for a run, so that none is taken twice. A trial whose process was killed is still open in the study
    while nobody holds its run: the next to look takes it up, and the run goes on where it was.

    Attributes:
        total: how many runs are wanted.
    """

    def __init__(self, config: ConfigDict, workdir: Path, folder: Path) -> None:
        """
        Args:
            config: of the sweep.
            workdir: where the study lies.
            folder: of the runs.

        Raises:
            InputError: Optuna is not installed, or the study there is of another sweep.
        """
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise InputError(
                f"config.sweep.sampler = {config.sweep.sampler}: needs Optuna; pip install 'panacea_jax[sweep]'"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.total = config.sweep.trials
        self._config, self._workdir, self._folder = config, workdir, folder
        self._axes = parse_axes(config.sweep.over, config)
        self._distributions = {axis.key: _distribution(axis) for axis in self._axes}
        self._open: dict[str, int] = {}
        self._made: dict[int, Run] = {}
        path = workdir / "study.journal"
        made_by = plain({
            "over": config.sweep.over, "objectives": config.sweep.objectives, "config_sha256": sha256_json(decisive_for_run(config)),
        })  # fmt: skip
        make_folder(workdir)
        with self._alone():
            self._study = optuna.create_study(
                storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))),
                study_name="sweep", load_if_exists=True,
                directions=["maximize" if objective(name)[1] else "minimize" for name in config.sweep.objectives],
            )  # fmt: skip
            before = self._study.user_attrs.get(MADE_BY)
            if before is None:
                self._study.set_user_attr(MADE_BY, made_by)
        if change := processes.first_change(before or made_by, made_by):
            raise InputError(f"{path}: of another sweep ({change}); choose another --workdir")

    @property
    def runs(self) -> list[Run]:
        """Those that were proposed so far, each once."""
        found: dict[str, Run] = {}
        for trial in self._proposed():
            with contextlib.suppress(InputError):  # an impossible combination, which was told when it was drawn
                run = self._run_of(trial)
                found.setdefault(run.name, run)
        return list(found.values())

    def take(self, claim: Callable[[Run], bool]) -> Run | None:
        """A run that ``claim`` makes ours: one that another process left behind, or a new one; None if all are under way or finished.

        A combination that is no possible configuration counts as failed, which is said.
        """
        with self._alone():
            for trial in self._running():
                if trial.params.keys() != self._distributions.keys():  # its process was killed while it was drawn
                    self._fail(trial.number)
                elif run := self._begin(trial, claim):
                    return run
            while len(self._proposed()) < self.total:
                self._study.sampler = self._sampler(len(self._study.get_trials(deepcopy=False)))
                number = self._study.ask(self._distributions).number
                if run := self._begin(self._study.get_trials(deepcopy=False)[number], claim):
                    return run
        return None

    def tell(self, run: Run) -> None:
        """It is finished: its figures, or that it failed, go to the study."""
        number = self._open.pop(run.name)
        with self._alone():
            self._tell(number, run)

    def is_open(self) -> bool:
        """Whether a run is not finished yet, or not proposed."""
        return bool(self._running()) or len(self._proposed()) < self.total

    def _begin(self, trial: "optuna.trial.FrozenTrial", claim: Callable[[Run], bool]) -> Run | None:
        """The trial's run, if it is ours. That of a trial with the setting of another may be finished, or under way elsewhere."""
        try:
            run = self._run_of(trial)
        except InputError as error:
            self._fail(trial.number)
            say(f"sweep: trial {trial.number} counts as failed: {error}")
            return None
        if status_of(run, self._folder) in FINISHED:
            self._tell(trial.number, run)
        elif claim(run):
            self._open[run.name] = trial.number
            return run
        return None

    def _tell(self, number: int, run: Run) -> None:
        """Of a run that has just finished another process may have told already, which found it finished."""
        manifest = read_manifest(self._folder / run.name)
        if manifest["status"] == "failed":
            return self._fail(number)
        figures = manifest["outcome"]["figures"]
        wanted = [objective(name)[0] for name in self._config.sweep.objectives]
        if missing := [name for name in wanted if name not in figures]:
            raise InputError(f"config.sweep.objectives: {missing[0]}: no set of config.eval.tasks gives it")
        self._study.tell(number, [figures[name]["value"] for name in wanted], skip_if_finished=True)

    def _fail(self, number: int) -> None:
        from optuna.trial import TrialState

        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _running(self) -> "list[optuna.trial.FrozenTrial]":
        from optuna.trial import TrialState

        return self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _proposed(self) -> "list[optuna.trial.FrozenTrial]":
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.params.keys() == self._distributions.keys()]

    def _run_of(self, trial: "optuna.trial.FrozenTrial") -> Run:
        if trial.number not in self._made:
            setting = tuple((axis.key, _value(axis, trial.params[axis.key])) for axis in self._axes)
            self._made[trial.number] = make_run(self._config, setting)
        return self._made[trial.number]

    def _sampler(self, number: int) -> "optuna.samplers.BaseSampler":
        """Of trial ``number``: the same whichever process draws it."""
        from optuna.samplers import NSGAIISampler, TPESampler

        seed = int(np.random.SeedSequence([self._config.seed, number]).generate_state(1)[0])
        if self._config.sweep.sampler == "tpe":
            return TPESampler(seed=seed)
        fewest, most = POPULATION
        return NSGAIISampler(seed=seed, population_size=min(max(self.total // 6, fewest), most))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        path = self._workdir / "study.lock"
        with path.open("ab") as file:
            lock(file, path)
            yield


def _distribution(axis: Axis) -> "optuna.distributions.BaseDistribution":
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if axis.span is None:
        return CategoricalDistribution(_choices(axis))
    low, high, log, whole = axis.span
    if whole:
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def _choices(axis: Axis) -> list[Any]:
    """The values as a study may hold them: lists of modules and the like as text."""
    return [v if isinstance(v, str | int | float) else repr(v) for v in axis.values]


def _value(axis: Axis, drawn: Any) -> Any:
    return drawn if axis.span is not None else axis.values[_choices(axis).index(drawn)]
