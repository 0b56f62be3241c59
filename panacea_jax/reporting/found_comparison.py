"""What a comparison left: the rows of compare.json, and the cells behind them."""

from collections.abc import Mapping
from pathlib import Path

from panacea_jax.config.variation import written
from panacea_jax.errors import InputError
from panacea_jax.evaluate.scores import Json
from panacea_jax.reporting.commands import GENERATIONS, command_of
from panacea_jax.reporting.outcomes import (
    HEADLINES,
    Estimate,
    Found,
    Outcome,
    ToSft,
    Trained,
    estimated,
)
from panacea_jax.stores import by_address
from panacea_jax.untrusted import read_object

COMPARISON = "compare.json"


def read_comparison(folder: Path) -> Found:
    """The content of a comparison's folder.

    Raises:
        InputError: compare.json is damaged, or not one of ours.
    """
    path = folder / COMPARISON
    result = read_object(path, strict=True)
    notes = [note for where in ("aligned/*", "cells/*/*") for note in sorted(folder.glob(f"{where}/cell.json"))]
    table = folder / "compare.md"
    try:
        if "cells" in result:  # others in the folder are of an earlier table; comparisons from before do not say which are theirs
            notes = [note for note in notes if note.parent.relative_to(folder).as_posix() in result["cells"]]
        cells = [(read_object(note, strict=True), note.parent) for note in notes]
        settings = {written(tuple(cell["setting"].items())): cell["setting"] for cell, _ in cells if "setting" in cell}
        outcomes = [_of_row(row, settings) for row in result["rows"]]
        tried = [
            Outcome(str(c["method"]), {name: Estimate(float(c[name])) for name in HEADLINES if name in c})
            for choice in result["grid"] for c in choice["candidates"]
        ]  # fmt: skip
        failing = [(f"seed {seed}", f"fails the guard: {result['bounds']}") for seed, held in result["guard"].items() if not held]
        commands = [_command(result["config"], folder)] if "config" in result else []
        before = next((outcome.method for outcome in outcomes if not outcome.attacked), "aligned")
        runs = [
            Trained(_cell_label(cell, before), cell["seed"], where, _stages(cell, where, folder))
            for cell, where in cells
        ]  # fmt: skip
        order = {outcome.label: i for i, outcome in enumerate(outcomes)}
        runs.sort(key=lambda run: (order.get(run.label, len(order)), run.seed))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: not a comparison of ours ({type(error).__name__}: {error})") from error
    lines = [line.removeprefix("* ") for line in _text(table).splitlines() if line.startswith("* ")]
    return Found(folder, outcomes, runs, tried, lines, failing, commands)


def _command(config: Json, folder: Path) -> str:
    """What made the comparison: ``run`` over the methods that are listed, or ``compare`` of the one that is configured."""
    listed = config["compare"]["methods"] or config["compare"]["grid"]
    return command_of("run" if listed else "compare", config, by_address(folder))


def _stages(cell: Json, where: Path, root: Path) -> dict[str, Path]:
    """The stages of training that made a cell, wherever they lie, and its answers."""
    return {name: root / path for name, path in cell["stages"].items()} | {GENERATIONS: where / GENERATIONS}


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""


def _of_row(row: Json, settings: Mapping[str, Json]) -> Outcome:
    said = row.get("setting", "")
    megabytes = max(row["step_bytes"].values(), default=0) / 2**20
    costs = {
        "passes / SFT": _number(row["passes_to_sft"]),
        "time / SFT": _number(row["time_to_sft"]),
        "step MiB": f"{megabytes:.0f}" if megabytes else "–",
        "extra data": ", ".join(row["extra_data"]) or "none",
    }
    if "perplexity" in row:
        costs["perplexity"] = _number(row["perplexity"])
    return Outcome(
        str(row["method"]),
        {name: estimated(found["mean"], found["ci95"]) for name, found in row["figures"].items()},
        row["ratio"],
        settings.get(said) or ({"setting": said} if said else {}),
        list(row["seeds"]),
        attacked=row["ratio"] is not None,
        costs=costs,
        to_sft={name: ToSft(found["difference"], found["p"]) for name, found in (row["against_sft"] or {}).items()},
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _cell_label(cell: Json, before: str) -> str:
    """As the outcome that the cell is part of is called; ``before`` is that of the model before fine-tuning."""
    method = cell["method"] if cell["ratio"] is not None else before
    return Outcome(method, {}, cell["ratio"], cell.get("setting", {})).label
