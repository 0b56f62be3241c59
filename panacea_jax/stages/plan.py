"""The command ``plan``: memory and least time of a step, and the cost of a recipe, on a machine that is not there."""

import dataclasses
import functools
from collections.abc import Callable, Sequence, Sized
from pathlib import Path

from ml_collections import ConfigDict
from rich.table import Table

from panacea_jax.data.slices import find_slice
from panacea_jax.data.sources import parse_source
from panacea_jax.errors import InputError
from panacea_jax.planning.explain import TURNS, Explained
from panacea_jax.planning.plan import Plan, plans_for
from panacea_jax.planning.prices import PRICES, READ
from panacea_jax.planning.recipe import Counts, RecipePhase, recipe_phases
from panacea_jax.planning.topology import Topology, topology
from panacea_jax.progress import table_console
from panacea_jax.stages.generate import eval_records
from panacea_jax.stages.streams import defender_records, is_local, user_records
from panacea_jax.workdir import write_json


def plan_stage(
    config: ConfigDict, name: str, search: bool = False, workdir: Path | None = None, price: float = 0.0, explained: bool = False
) -> Path | None:
    """Plan the fine-tuning step of a configuration for a topology, add up its recipe, and print both; returns ``plan.json``, if that is
    written, beside ``plan_recipe.json``.

    Args:
        config: validated configuration.
        name: see :func:`panacea_jax.planning.topology.topology`.
        search: try alternatives, see :func:`panacea_jax.planning.plan.plans_for`.
        workdir: where the files go; None writes none.
        price: dollars a chip-hour; 0: that of ``planning/prices.py``.
        explained: print where the least time of the first plan's step goes.

    Raises:
        InputError: the topology, the model or a mesh that does not divide the devices; nothing that fits, after the table.
    """
    if not name:
        raise InputError("--topology is not set: name a machine, like v5e:4x4 or gpu:h100x8")
    if not config.model.path:
        raise InputError(
            "config.model.path is not set: give a folder with config.json, or a hub id"
        )
    machine = topology(name)
    plans = plans_for(config, machine, search)
    print_plans(plans)
    if explained:
        if plans[0].explained is None:
            raise InputError(f"--explain: nothing was compiled for --topology={name}; docs/planning.md says what it takes")
        print_explained(plans[0].explained)
    phases = recipe_phases(config, machine, _counts(config), plans[0])
    cost = _cost(phases, machine, price)
    print_recipe(phases, cost, machine)
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        records = [
            dataclasses.asdict(p)
            | {"total": p.total, "fits": p.fits, "step_seconds": p.step_seconds}
            for p in plans
        ]
        write_json(workdir / "plan.json", records)
        write_json(workdir / "plan_recipe.json", {"phases": [dataclasses.asdict(p) for p in phases], **cost})
    best = plans[0]
    if not best.fits:
        needed = best.refused or f"{_gib(best.total)} of {_gib(best.limit)} a device needed"
        raise InputError(
            f"--topology={name}: {needed}; use more chips, a larger mesh.fsdp or .tensor, model.remat=full, a smaller batch or "
            "max_length, or --search"
        )
    return workdir and workdir / "plan.json"


def print_plans(plans: list[Plan]) -> None:
    """Print plans side by side, the first being the one to take."""
    console = table_console(40 + 30 * len(plans))
    table = Table(title=f"{plans[0].topology}: one device, one step", title_justify="left")
    table.add_column("", no_wrap=True)
    for p in plans:
        table.add_column(p.title, justify="right")
    table.add_row("attention", *(p.attention for p in plans))
    for kind in plans[0].resident:
        table.add_row(kind, *(_gib(p.resident[kind]) for p in plans))
    table.add_row("temporary", *(_gib(p.temporary) for p in plans))
    table.add_row("  by the model", *(_gib(sum(p.modelled.values())) for p in plans))
    for kind in plans[0].modelled:
        table.add_row(f"    {kind}", *(_gib(p.modelled[kind]) for p in plans))
    table.add_row("total", *(_gib(p.total) for p in plans))
    table.add_row("available", *(_gib(p.limit) for p in plans))
    table.add_row("fits", *("yes" if p.fits else "NO" for p in plans))
    if any(p.refused for p in plans):
        table.add_row("compiler", *(p.refused for p in plans))
    table.add_row("TFLOP", *(f"{p.flops / 1e12:.2f}" for p in plans))
    table.add_row("sent", *(_gib(p.sent) for p in plans))
    if any(p.sent_between for p in plans):
        table.add_row("  between slices", *(_gib(p.sent_between) for p in plans))
    for bound in plans[0].seconds:
        table.add_row(f"{bound}, at least", *(f"{p.seconds[bound] * 1e3:.1f} ms" for p in plans))
    table.add_row("step, at least", *(f"{p.step_seconds * 1e3:.1f} ms" for p in plans))
    table.add_row("device s a record", *(f"{p.cost:.4f}" for p in plans))
    console.print(table)
    console.print(f"Attention: {plans[0].attention}, {plans[0].attention_why}.", highlight=False)
    console.print(
        "Memory: "
        + (
            "the compiler's."
            if plans[0].arguments is not None
            else "a model, not a compiler's figure."
        )
        + " Times: the least that the data sheets allow, if all overlaps; nothing was run.",
        highlight=False,
    )


def print_explained(explained: Explained) -> None:
    """Print where the least time of a step goes."""
    console = table_console(140)
    table = Table(title="Where the least time goes, each operation by itself, one after the other", title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in (*TURNS, "together", "bound by", "TFLOP", "moved", "sent"):
        table.add_column(heading, justify="right")
    for place, turns in explained.places.items():
        costs = list(turns.values())
        times = (f"{turns[turn].seconds * 1e3:.1f} ms" if turn in turns else "" for turn in TURNS)
        table.add_row(
            place, *times, f"{sum(c.seconds for c in costs) * 1e3:.1f} ms", max(costs, key=lambda c: c.seconds).bound,
            f"{sum(c.flops for c in costs) / 1e12:.2f}", _gib(sum(c.moved for c in costs)), _gib(sum(c.sent for c in costs)),
        )  # fmt: skip
    console.print(table)
    for number, (what, count, cost) in enumerate(explained.largest, 1):
        line = f"{number}. {count} × {what}: {cost.seconds * 1e3:.2f} ms, by {cost.bound} ({cost.flops / 1e12:.2f} TFLOP"
        console.print(f"{line}, {_gib(cost.moved)} moved, {_gib(cost.sent)} sent)", highlight=False, soft_wrap=True)
    (wide, flops), (sent, waits) = explained.wide, explained.exchanges
    console.print(
        f"Only moved: {_gib(explained.copies.moved)}, {explained.copies.seconds * 1e3:.1f} ms. Matrix products of float32: "
        f"{wide / 1e12:.2f} of {flops / 1e12:.2f} TFLOP. Exchanges: {sent}, of which {waits} wait.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


# ---- the recipe


def _counts(config: ConfigDict) -> Counts:
    """Records of the main streams and of the evaluation sets."""
    data = config.data
    counts = {
        "user": _count([data.user, *filter(None, [data.attack])], lambda: user_records(config), data.num_examples),
        "alignment": _count([data.alignment], lambda: defender_records(config, "alignment"), data.num_alignment),
    }
    for spec in config.eval.tasks:
        source = parse_source(spec)
        named = find_slice(source.task, source.slice)
        asked = named.count if named else config.eval.num_examples
        counts[spec] = _count([spec], functools.partial(eval_records, config, spec), asked)
    return counts


def _count(specs: Sequence[str], read: Callable[[], Sized], asked: int) -> int | None:
    """How many records there are, where the sources are on this machine; else as many as are asked for, if that is a number."""
    try:
        if all(map(is_local, specs)):
            return len(read())
    except InputError:  # as the machine may not be there, so may the data
        pass
    return asked or None


def _cost(phases: Sequence[RecipePhase], machine: Topology, price: float) -> dict[str, float | str | None]:
    """Hours, chip-hours and dollars of what is counted; None for dollars where no price is known."""
    hours = sum(p.seconds for p in phases if p.seconds is not None) / 3600
    kind = machine.kind
    known = PRICES.get(kind)
    dollars = price or (known.dollars if known else None)
    source = "--price" if price else f"{known.source}, {READ}" if known else f"no price of {kind} is known; say one with --price"
    return {
        "hours": hours, "chip_hours": hours * machine.chips, "price": dollars, "price_of": source,
        "dollars": None if dollars is None else hours * machine.chips * dollars,
    }  # fmt: skip


def print_recipe(phases: Sequence[RecipePhase], cost: dict[str, float | str | None], machine: Topology) -> None:
    """Print what the stages and answers of a run take."""
    console = table_console(140)
    table = Table(title=f"{machine.name}: the whole recipe, at the data sheet's speed", title_justify="left", show_footer=True)
    table.add_column("", "together", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("hours", f"{cost['hours']:.3g}", justify="right")
    for p in phases:
        table.add_row(p.name, p.work, "" if p.seconds is None else f"{p.seconds / 3600:.3g}")
    console.print(table)
    dollars = "" if cost["dollars"] is None else f" · ${cost['price']:.2f} = ${cost['dollars']:,.2f}"
    console.print(
        f"{cost['chip_hours']:.3g} chip-hours{dollars} ({cost['price_of']}). All batches and answers are taken to be at their longest, "
        "and chips at a speed that no program reaches. Not counted: starting, compiling, looks at whole sets, judging.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _gib(n: float | int) -> str:
    return f"{n / 2**30:,.2f} GiB"
