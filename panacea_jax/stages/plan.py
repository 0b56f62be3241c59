"""The command ``plan``: memory and least time of a step on a machine that is not there."""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict
from rich.table import Table

from panacea_jax.errors import InputError
from panacea_jax.planning.plan import Plan, plans_for
from panacea_jax.planning.topology import topology
from panacea_jax.progress import table_console
from panacea_jax.workdir import write_json


def plan_stage(
    config: ConfigDict, name: str, search: bool = False, workdir: Path | None = None
) -> Path | None:
    """Plan the fine-tuning step of a configuration for a topology and print the outcome; returns ``plan.json``, if that is written.

    Args:
        config: validated configuration.
        name: see :func:`panacea_jax.planning.topology.topology`.
        search: try alternatives, see :func:`panacea_jax.planning.plan.plans_for`.
        workdir: where ``plan.json`` goes; None writes none.

    Raises:
        InputError: the topology, the model or a mesh that does not divide the devices; nothing that fits, after the table.
    """
    if not name:
        raise InputError("--topology is not set: name a machine, like v5e:4x4 or gpu:h100x8")
    if not config.model.path:
        raise InputError(
            "config.model.path is not set: give a folder with config.json, or a hub id"
        )
    plans = plans_for(config, topology(name), search)
    print_plans(plans)
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        records = [
            dataclasses.asdict(p)
            | {"total": p.total, "fits": p.fits, "step_seconds": p.step_seconds}
            for p in plans
        ]
        write_json(workdir / "plan.json", records)
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


def _gib(n: float | int) -> str:
    return f"{n / 2**30:,.2f} GiB"
