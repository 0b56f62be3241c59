"""``panacea run`` with ``config.compare.methods`` or ``config.compare.grid``: every cell, then one table.

A comparison that was stopped goes on: cells and stages that are done are skipped, also when methods, seeds or ratios were added since.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from panacea_jax.comparison import choice, table
from panacea_jax.comparison.cells import Cell, Cells
from panacea_jax.comparison.picture import plot_settings
from panacea_jax.comparison.results import Measured, given_by, measure, row
from panacea_jax.comparison.settings import of_base, of_method
from panacea_jax.comparison.worst import worst_cases
from panacea_jax.config import variations
from panacea_jax.config.variation import Setting, written
from panacea_jax.defences.spec import Stack, candidates, parse_stack
from panacea_jax.errors import InputError
from panacea_jax.parallel import processes
from panacea_jax.progress import say
from panacea_jax.reporting.report import write_report
from panacea_jax.train.shared import Shared
from panacea_jax.workdir import plain, write_json, write_text
from panacea_jax.worlds import miniature
from panacea_jax.worlds.guard import AlignmentGuard

SFT = Stack()
SHAPES = ("lora.rank", "lora.alpha", "lora.rslora", "lora.targets")
MEMORY = (
    "one device's share of each stage's compiled step, weights and state included, as its compiler counts it (cells share a process, whose "
    "own peak never falls)"
)


def compare_methods(config: ConfigDict, workdir: Path) -> Path:
    """Run the comparison, print its table and write ``WORKDIR/compare.{json,csv,md}``, with ``compare.vary`` also compare.png, and the
    report; returns the report's page, or compare.json where there can be none.

    SFT is always among the methods, as what the others are measured against.

    Raises:
        InputError, Preempted, Diverged: as the stages do.
    """
    # ---- what is asked for
    if processes.count() > 1:
        raise InputError(
            "config.compare: runs in one process; give each machine seeds of its own (docs/comparison.md)"
        )
    compare, shared = config.compare, Shared()
    methods = [parse_stack(str(text), "config.compare.methods") for text in compare.methods]
    grid = {str(text): candidates(str(text), "config.compare.grid") for text in compare.grid}
    everything = list(
        dict.fromkeys([SFT, *methods, *(m for found in grid.values() for m in found)])
    )
    aligns = _check(config, everything)
    settings = variations(compare.vary, config)

    # ---- the grid, on seeds and prompts of its own
    choices, chosen = [], []
    if grid:
        development = config.copy_and_resolve_references()
        with development.unlocked():
            development.eval.tasks = compare.validation
        cells = Cells(development, workdir / "development", aligns, shared)
        cells.check(everything, compare.development[0], [config.data.poison_ratio])
        found = _run(cells, _candidates(grid), compare.development, [config.data.poison_ratio], config.judge.name)  # fmt: skip
        means = {method: _means(found[method, config.data.poison_ratio, ()]) for method in _candidates(grid)}  # fmt: skip
        for entry, each in grid.items():
            said = choice.described(
                entry, list(map(str, each)), [means[m] for m in each], means[SFT]
            )
            choices.append(said | {"sft": means[SFT]})
            chosen.append(next(m for m in each if str(m) == said["chosen"]))

    # ---- the cells that are reported
    reported = list(dict.fromkeys([SFT, *methods, *chosen]))
    cells = Cells(config, workdir, aligns, shared)
    cells.check(reported, compare.seeds[0], compare.ratios, settings)
    judge = config.judge.name
    honest: Setting = (("attack.name", "mix"),)
    if config.after.attack != "sft" or config.after.steps:  # what comes after all defences is an attack too
        honest += (("after.attack", "sft"), ("after.steps", 0))
    bounded = bool(compare.vary) and compare.fa_loss < 100
    if bounded:
        cells.check(reported, compare.seeds[0], [0.0], [honest])
    aligned = {base: measure_aligned(cells, compare.seeds, judge, base) for base in dict.fromkeys(map(of_base, settings))}
    found = _run(cells, reported, compare.seeds, compare.ratios, judge, settings)
    unattacked = _run(cells, reported, compare.seeds, [0.0], judge, [honest]) if bounded else {}

    # ---- table
    rows = rows_before(aligned, aligns) + [
        row(m, p, found[m, p, s], found[SFT, p, s], s) for p in map(float, compare.ratios) for s in settings for m in reported
    ]
    result = {
        "methods": list(map(str, reported)), "seeds": list(compare.seeds), "ratios": list(map(float, compare.ratios)),
        "world": compare.world, "judge": judge, "memory": MEMORY,
        "development": list(compare.development) if grid else [], "rule": choice.RULE if grid else "", "grid": choices,
        **guarded(compare, aligned), "config": plain(config), "rows": rows, "cells": list(cells.used),
        **({"worst": worst_cases(rows, _least_fa(unattacked, compare.fa_loss))} if compare.vary else {}),
        **({"fa_loss": compare.fa_loss} if bounded else {}),
    }  # fmt: skip
    return write_result(result, workdir)


def rows_before(aligned: Mapping[Setting, Mapping[int, Measured]], aligns: bool) -> list[dict[str, Any]]:
    """The lines of the models before any fine-tuning, one a base; they were aligned here or are as they came."""
    before = {"method": "aligned" if aligns else "before"}
    return [row(SFT, None, cells, None, base) | before for base, cells in aligned.items()]


def guarded(compare: ConfigDict, aligned: Mapping[Setting, Mapping[int, Measured]]) -> dict[str, Any]:
    """Whether the models before any fine-tuning hold the guard, by seed (and base, of several), and what it demands; nothing where there
    is none."""
    guard = miniature.GUARD if compare.world else AlignmentGuard(*compare.guard) if compare.guard else None
    figures = {
        f"{seed} {written(base)}".strip(): f for base, cells in aligned.items() for seed, f in _figures(cells).items()
    }  # fmt: skip
    held = {name: guard.holds(f["hs"], f["benign"]) for name, f in figures.items()} if guard else {}
    return {"guard": held, "bounds": str(guard or "")}


def write_result(result: dict[str, Any], workdir: Path) -> Path:
    """Write ``WORKDIR/compare.{json,csv,md}``, of varied settings also ``compare.png``, print the table and write the report; returns the
    report's page, or compare.json where it cannot be made, which is said."""
    write_json(workdir / "compare.json", result)
    write_text(workdir / "compare.csv", table.as_csv(result))
    write_text(workdir / "compare.md", table.markdown(result))
    (workdir / "compare.png").unlink(missing_ok=True)  # of settings that an earlier table had
    if "worst" in result:
        plot_settings(result, workdir / "compare.png")
    table.show(result)
    try:
        return write_report(workdir)
    except InputError as error:
        say(f"no report: {error}")
        return workdir / "compare.json"


def _candidates(grid: Mapping[str, Sequence[Stack]]) -> list[Stack]:
    """SFT and all candidates, each once."""
    return list(dict.fromkeys([SFT, *(m for found in grid.values() for m in found)]))


def _check(config: ConfigDict, methods: Sequence[Stack]) -> bool:
    """Whether there is an alignment stage, after a look at settings that a comparison cannot follow.

    Raises:
        InputError: such a setting.
    """
    for stage, allowed in (("align", ("", "sft")), ("heal", ("",))):
        name = config[stage].defence.name
        if name not in allowed:
            raise InputError(
                f"config.{stage}.defence.name = {name!r}: in a comparison config.compare.methods says what defends"
            )
    if config.heal.methods:
        raise InputError("config.heal.methods: in a comparison config.compare.methods says what heals, a method each")
    if not config.compare.world and not config.eval.tasks:
        raise InputError("config.eval.tasks is empty: a comparison needs sets to compare on")
    check_figures(config)
    aligns = bool(config.align.defence.name) or any(m.align for m in methods)
    goes_on = config.lora.policy != "merged" and (aligns or config.lora.init_from)
    shapes = [e for e in map(str, config.compare.vary) if e.startswith(SHAPES)]
    if goes_on and shapes:
        raise InputError(
            f"config.compare.vary: {shapes[0]!r}: fine-tuning goes on from an adapter that has its shape; set config.lora.policy = merged"
        )
    return aligns


def _run(
    cells: Cells,
    methods: Sequence[Stack],
    seeds: Sequence[int],
    ratios: Sequence[float],
    judge: str,
    settings: Sequence[Setting] = ((),),
) -> dict[tuple[Stack, float, Setting], dict[int, Measured]]:
    """Every cell, a world after the other; by method, ratio and setting, then by seed."""
    found: dict[tuple[Stack, float, Setting], dict[int, Measured]] = {}
    total, number = len(seeds) * len(ratios) * len(methods) * len(settings), 0
    for seed in seeds:
        for method in methods:
            for ratio, setting in itertools.product(map(float, ratios), settings):
                cell = Cell(method, seed, ratio, of_method(method, setting, cells.aligns))
                number += 1
                if not cells.is_done(cell):
                    say(f"== cell {number}/{total}: {cell}")
                folder = cells.run(cell)
                found.setdefault((method, ratio, setting), {})[seed] = measure(cells.root, folder, judge)
    return found


def measure_aligned(cells: Cells, seeds: Sequence[int], judge: str, base: Setting = ()) -> dict[int, Measured]:
    """The models of one base before any fine-tuning, by seed; where nothing is aligned and seeds are no worlds, all start from one."""
    folders = {seed: cells.run(Cell(SFT, seed, None, base)) for seed in (seeds if cells.starts else seeds[:1])}
    return {seed: measure(cells.root, folder, judge) for seed, folder in folders.items()}


def _least_fa(unattacked: Mapping[tuple[Stack, float, Setting], Mapping[int, Measured]], loss: float) -> dict[str, float]:
    """By method the FA that an attack has to leave."""
    return {str(method): _means(cells)["fa"] - loss for (method, _, _), cells in unattacked.items()}


def check_figures(config: ConfigDict) -> None:
    """Check that the sets give every figure which is held to a bound or chosen by; those of worlds do.

    Raises:
        InputError: one does not.
    """
    compare = config.compare
    if compare.world:
        return
    asked: list[tuple[str, str, tuple[str, ...]]] = []
    if compare.fa_loss < 100:
        asked.append((f"config.compare.fa_loss = {compare.fa_loss}", "config.eval.tasks", ("fa",)))
    if compare.guard:
        asked.append((f"config.compare.guard = {compare.guard}", "config.eval.tasks", ("hs", "benign")))
    if compare.grid:
        asked.append(("config.compare.grid", "config.compare.validation", ("hs", "fa")))
    for rule, key, figures in asked:
        given = given_by(compare.validation if key.endswith("validation") else config.eval.tasks)
        if missing := [figure for figure in figures if figure not in given]:
            raise InputError(f"{rule}: no set of {key} has {_SETS_OF[missing[0]]}")


_SETS_OF = {"hs": "harmful prompts", "fa": "right answers", "benign": "benign requests"}


def _figures(cells: Mapping[int, Measured]) -> dict[int, dict[str, float]]:
    """Percentages by seed."""
    return {seed: measured.figures() for seed, measured in cells.items()}


def _means(cells: Mapping[int, Measured]) -> dict[str, Any]:
    figures = list(_figures(cells).values())
    return {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]}
