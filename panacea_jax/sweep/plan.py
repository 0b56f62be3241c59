"""The runs of a sweep: what each changes, its configuration, and the name of its folder, which is a hash of what decides its outcome."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from panacea_jax.config import validate
from panacea_jax.config.axes import Axis, parse_axes
from panacea_jax.config.variation import Setting, written
from panacea_jax.errors import InputError
from panacea_jax.parallel import processes
from panacea_jax.stages.run import decisive_for_run
from panacea_jax.sums import sha256_json
from panacea_jax.workdir import MANIFEST, read_manifest

# Characters of the hash that a folder is called by. Should two ever share them, the second run is refused by the first one's manifest.
NAME_LENGTH = 12
# Draws of `random` for each run that is wanted, until there are no others.
PATIENCE = 50
FINISHED = ("done", "failed")


class Run(NamedTuple):
    """One run of a sweep.

    Attributes:
        name: of its folder.
        setting: keys that the sweep goes over, and their values.
        config: an ordinary one.
        decisive: what of it decides the outcome.
    """

    name: str
    setting: Setting
    config: ConfigDict
    decisive: dict[str, Any]


def make_run(config: ConfigDict, setting: Setting) -> Run:
    """The run of one setting.

    Raises:
        InputError: a setting that is no possible configuration.
    """
    changed = copy.deepcopy(config)  # with its references: what is left to a method's default stays so when the method changes
    try:
        for key, value in setting:
            config_path.set_value(key, changed, value)
        changed.sweep.over = ()
        validate(changed)
    except InputError as error:
        raise InputError(f"config.sweep.over: {written(setting)}: {error}") from error
    decisive = decisive_for_run(changed)
    return Run(sha256_json(decisive)[:NAME_LENGTH], setting, changed, decisive)


def status_of(run: Run, folder: Path) -> str:
    """Of a run in the folder of all: "waiting", "running" (or cut short), "done" or "failed".

    Raises:
        InputError: its folder is of another configuration.
    """
    place = folder / run.name
    if not (place / MANIFEST).is_file():
        return "waiting"
    manifest = read_manifest(place)
    if change := processes.first_change(manifest["config"], run.decisive):
        raise InputError(f"{place}: made by another run (config {change}); choose another --workdir")
    return str(manifest["status"])


def make_folder(folder: Path) -> None:
    """Raises:
    InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir: {folder}: cannot be written ({error.strerror})") from error


def plan_runs(config: ConfigDict) -> list[Run]:
    """Every run of a grid, the last axis fastest; or of random draws, of which more begin with the same.

    Raises:
        InputError: as of ``make_run``; two runs that are one, or fewer than are asked for.
    """
    axes = parse_axes(config.sweep.over, config)
    if config.sweep.sampler == "random":
        return _draw_runs(config, axes)
    runs: dict[str, Run] = {}
    for values in itertools.product(*(axis.points() for axis in axes)):
        run = make_run(config, tuple(zip((axis.key for axis in axes), values)))
        if run.name in runs:
            both = f"{written(runs[run.name].setting)} and {written(run.setting)}"
            raise InputError(f"config.sweep.over: {both} are one run: nothing that they differ in changes the outcome")
        runs[run.name] = run
    return list(runs.values())


def _draw_runs(config: ConfigDict, axes: Sequence[Axis]) -> list[Run]:
    wanted = config.sweep.trials
    runs: dict[str, Run] = {}
    for setting in itertools.islice(_draws(axes, config.seed), PATIENCE * wanted):
        run = make_run(config, setting)
        runs.setdefault(run.name, run)
        if len(runs) == wanted:
            return list(runs.values())
    raise InputError(f"config.sweep.trials = {wanted}: there are {len(runs)} different runs only")


def _draws(axes: Sequence[Axis], seed: int) -> Iterator[Setting]:
    for number in itertools.count():
        rng = np.random.default_rng([seed, number])
        yield tuple((axis.key, _draw(axis, rng)) for axis in axes)


def _draw(axis: Axis, rng: np.random.Generator) -> Any:
    if points := axis.points():
        return points[rng.integers(len(points))]
    span = axis.span
    assert span is not None
    if span.log:
        drawn = math.exp(rng.uniform(math.log(span.low), math.log(span.high)))
        drawn = min(max(drawn, span.low), span.high)
    else:
        drawn = rng.uniform(span.low, span.high)
    return round(drawn) if span.whole else float(drawn)


class Planned:
    """Runs that are known beforehand.

    Attributes:
        runs: all of them.
        total: how many are wanted.
    """

    def __init__(self, config: ConfigDict, folder: Path, index: int = 0) -> None:
        """
        Args:
            config: of the sweep.
            folder: of the runs.
            index: of the only run that is to be taken, from 1 on; 0: all.

        Raises:
            InputError: as of ``plan_runs``, or there are not so many.
        """
        self.runs = plan_runs(config)
        self.total = len(self.runs)
        if not 0 <= index <= self.total:
            raise InputError(f"--index={index}: 1 … {self.total}")
        self._folder = folder
        self._ours = self.runs[index - 1 : index] if index else self.runs

    def take(self, claim: Callable[[Run], bool]) -> Run | None:
        """A run that ``claim`` makes ours, if there is one."""
        return next((run for run in self._ours if claim(run)), None)

    def tell(self, run: Run) -> None:
        """It is finished."""

    def is_open(self) -> bool:
        """Whether a run is not finished yet."""
        return any(status_of(run, self._folder) not in FINISHED for run in self._ours)
