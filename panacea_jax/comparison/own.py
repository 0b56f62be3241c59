"""``panacea compare``: one's own model and data, with the rows that a defence has to be read beside.

before · SFT · SFT + noise as long as ε · the defence · its w alone

The defence is that of the sections ``align.defence``, ``defence`` and ``heal.defence``. Stopped, the same command goes on.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from panacea_jax.comparison.cells import Cell, Cells
from panacea_jax.comparison.results import NOTE, Measured, measure, row
from panacea_jax.comparison.run import (
    MEMORY,
    SFT,
    check_figures,
    guarded,
    measure_aligned,
    rows_before,
    write_result,
)
from panacea_jax.config import attack_of, get_config, part_of, stage_config
from panacea_jax.config.variation import Setting
from panacea_jax.defences.spec import Part, Stack
from panacea_jax.errors import InputError
from panacea_jax.parallel import processes
from panacea_jax.progress import say
from panacea_jax.train.shared import Shared
from panacea_jax.untrusted import read_object
from panacea_jax.workdir import plain, read_manifest

NOISE = "sft + noise as long as ε"


def compare_own(config: ConfigDict, workdir: Path) -> Path:
    """Run the rows, print their table and write ``WORKDIR/compare.{json,csv,md}`` and the report; returns the report's page, or
    compare.json where there can be none.

    Seeds and poison ratios are those of ``config.compare``; where it says nothing, ``config.seed`` and ``config.data.poison_ratio``.

    Raises:
        InputError, Preempted, Diverged: as the stages do; InputError also for keys that only ``panacea run`` compares by.
    """
    # ---- what is asked for
    _check(config)
    seeds, ratios = _axes(config)
    method, judge = _method(config), config.judge.name
    cells = Cells(config, workdir, bool(config.align.defence.name), Shared())
    cells.check([SFT, method], seeds[0], ratios)

    # ---- every row
    if not cells.is_done(Cell(SFT, seeds[0], None)):
        say(f"== {'aligned' if cells.aligns else 'before'}")
    before: dict[Setting, dict[int, Measured]] = {(): measure_aligned(cells, seeds, judge)}
    found: dict[tuple[float, str], dict[int, Measured]] = {}
    norms: list[float] = []
    deployed: list[str] = []
    learnt: list[str] = []
    for seed in seeds:
        for ratio in ratios:
            rows, norm = _rows(cells, method, seed, ratio)
            norms += [] if norm is None else [norm]
            deployed.append(_to_deploy(cells, Cell(method, seed, ratio)))
            learnt = learnt or _learnt(cells, Cell(method, seed, ratio), Cell(SFT, seed, ratio))
            for name, folder in rows.items():
                found.setdefault((ratio, name), {})[seed] = measure(cells.root, folder, judge)

    # ---- table, report
    names = list(dict.fromkeys(name for _, name in found))
    lines = [
        row(method, ratio, found[ratio, name], found[ratio, str(SFT)]) | {"method": name}
        for ratio in ratios for name in names
    ]  # fmt: skip
    result = {
        "methods": names, "seeds": list(seeds), "ratios": list(ratios), "world": config.compare.world, "judge": judge, "memory": MEMORY,
        "development": [], "rule": "", "grid": [], **guarded(config.compare, before),
        "rows": [*rows_before(before, cells.aligns), *lines], "notes": [*_notes(config, method, norms, deployed), *learnt],
        "config": plain(config), "cells": list(cells.used),
    }  # fmt: skip
    return write_result(result, workdir)


def _check(config: ConfigDict) -> None:
    """Raises:
    InputError: a setting that these rows cannot follow.
    """
    if processes.count() > 1:
        raise InputError("compare: runs in one process")
    several = {"compare.methods": config.compare.methods, "compare.grid": config.compare.grid, "heal.methods": config.heal.methods}
    for key in (key for key, methods in several.items() if methods):
        raise InputError(f"config.{key}: for `panacea run`; `compare` takes the defence of config.align, config.defence and config.heal")
    if config.export.without_epsilon:
        raise InputError("config.export.without_epsilon: `compare` has a row of its own for w alone")
    if not (config.compare.world or config.eval.tasks):
        raise InputError("config.eval.tasks is empty: a comparison needs sets to compare on")
    check_figures(config)


def _method(config: ConfigDict) -> Stack:
    """The defence of the configuration, of all stages."""
    parts = {stage: part_of(stage_config(config, stage).defence) for stage in ("align", "finetune", "heal")}
    return Stack(**{stage: part for stage, part in parts.items() if part.name not in ("", "sft")})


def _axes(config: ConfigDict) -> tuple[Sequence[int], Sequence[float]]:
    """Seeds and poison ratios.

    Raises:
        InputError: ratios of nothing.
    """
    compare, unsaid = config.compare, get_config().compare
    seeds = compare.seeds if compare.world or compare.seeds != unsaid.seeds else (config.seed,)
    if _has_attack(config):
        ratios = compare.ratios if compare.ratios != unsaid.ratios else (config.data.poison_ratio,)
    elif compare.ratios == unsaid.ratios:
        ratios = (0.0,)
    else:
        raise InputError(f"config.compare.ratios = {compare.ratios}: shares of config.data.attack, which is not set")
    return seeds, tuple(map(float, ratios))


def _has_attack(config: ConfigDict) -> bool:
    """Whether anything is mixed into the user's records, or made of them."""
    return bool(config.data.attack or config.compare.world or attack_of(config).is_benign)


def _rows(cells: Cells, method: Stack, seed: int, ratio: float) -> tuple[dict[str, Path], float | None]:
    """Folders of the cells by the names of their rows, and the norm of ε if the defence has one."""
    sft, ours = Cell(SFT, seed, ratio), Cell(method, seed, ratio)
    rows = {sft.name: _run(cells, sft)}
    if method == SFT:
        return rows, None
    defended, norm, bare = _run(cells, ours), None, None
    if epsilon := cells.epsilon(ours):
        norm = _norm(epsilon)
        noise = Stack(heal=Part("random_perturbation", (("rho", norm),)))
        rows[NOISE] = _run(cells, Cell(noise, seed, ratio, title=NOISE))
        if epsilon.parent.name == "heal":  # without it, it is what was healed
            bare = ours._replace(method=dataclasses.replace(method, heal=None))
        else:
            bare = ours._replace(title=f"{method}, w alone", bare=True)
    rows[ours.name] = defended
    if bare and bare.name not in rows:
        rows[bare.name] = _run(cells, bare)
    return rows, norm


def _run(cells: Cells, cell: Cell) -> Path:
    if not cells.is_done(cell):
        say(f"== {cell}")
    return cells.run(cell)


def _norm(epsilon: Path) -> float:
    """L2 norm over all tensors of an exported ε."""
    return math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in load_file(epsilon).values()))


def _to_deploy(cells: Cells, cell: Cell) -> str:
    """Where the adapter or model of a cell that is done lies, from the comparison's folder."""
    stages = read_object(cells.folder(cell) / NOTE)["stages"]
    last = stages.get("heal", stages["finetune"])
    return f"{last}/{'adapter' if (cells.root / last / 'adapter').is_dir() else 'model'}"


def _learnt(cells: Cells, ours: Cell, sft: Cell) -> list[str]:
    """A line where a method learnt fewer of the user's records than SFT beside it: those that it chose by, as ρ "auto" does."""
    ours_of, sft_of = (_user_records(cells, cell) for cell in (ours, sft))
    if ours_of is None or sft_of is None or ours_of >= sft_of:
        return []
    return [
        f"{ours.name} learnt {ours_of} of the user's records and sft {sft_of}: the others were set apart to choose by. "
        "config.heal.sets names sets of your own for that."
    ]


def _user_records(cells: Cells, cell: Cell) -> int | None:
    """How many of them fine-tuning had; None where its manifest does not say."""
    stages = read_object(cells.folder(cell) / NOTE)["stages"]
    found = read_manifest(cells.root / stages["finetune"])["outcome"].get("records", {}).get("user")
    return None if found is None else int(found)


def _notes(config: ConfigDict, method: Stack, norms: Sequence[float], deployed: Sequence[str]) -> list[str]:
    """What has to be known besides to read these rows."""
    if norms:
        lengths = ", ".join(dict.fromkeys(f"{norm:.4g}" for norm in norms))
        lines = [
            f"{NOISE}: Gaussian noise of norm {lengths} on SFT's weights, which an ε of that norm has to beat. "
            "w alone: the defence without its ε, never to be deployed."
        ]  # fmt: skip
    else:
        lines = [f"{method} has no ε, so neither noise of its length nor w alone stands beside it."]
    more = f" (and {len(deployed) - 1} more, by seed and p)" if len(deployed) > 1 else ""
    lines.append(f"What {method} would deploy lies in this folder, {deployed[0]}{more}.")
    if not _has_attack(config):
        lines.append("p is 0 because nothing was mixed into the user's records; what they hold themselves is not known here.")
    return lines
