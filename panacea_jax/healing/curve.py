"""The curve that a radius was chosen by: ``radius.json``, ``radius.png``, and a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from panacea_jax.healing.choice import RULE, Budget, Share
from panacea_jax.healing.radius import ChosenRadius, Point
from panacea_jax.parallel import processes
from panacea_jax.progress import table_console
from panacea_jax.workdir import write_json


def as_json(found: ChosenRadius) -> dict[str, Any]:
    """The content of radius.json."""
    return {
        "radius": found.radius,
        "rule": RULE,
        "budget": found.budget._asdict(),
        "fails": {name: found.failing(name) for name in found.budget._asdict()},
        "points": [
            {
                "radius": p.radius, "losses": dict(p.losses),
                "figures": {n: {"k": s.k, "n": s.n, "percent": s.percent} for n, s in p.figures.items()},
            }
            for p in found.points
        ],
    }  # fmt: skip


def from_json(found: Mapping[str, Any]) -> ChosenRadius:
    """What was written."""
    points = [
        Point(p["radius"], p["losses"], {n: Share(s["k"], s["n"]) for n, s in p["figures"].items()})
        for p in found["points"]
    ]
    return ChosenRadius(found["radius"], points, Budget(**found["budget"]))


COLUMNS = {"hs": "HS", "hs_plus": "HS+", "fa": "FA", "benign": "benign answered", "coherence": "coherent"}
LOSSES = {"hs": "harmful", "fa": "task", "benign": "benign"}
COLOURS = {"hs": "#ee6677", "fa": "#4477aa", "benign": "#228833", "coherence": "#bbbbbb"}


def write_radius(found: ChosenRadius, folder: Path) -> None:
    """Write ``radius.json`` and ``radius.png`` into the folder and print the curve as a table; of several processes the first does."""
    if not processes.first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "radius.json", as_json(found))
    _plot(found, folder / "radius.png")
    console = table_console(160)
    table = Table(title="the radius, by held-out records (percent; losses in nats a token)", title_justify="left")
    for head in ("radius", *COLUMNS.values(), "harmful loss", "task loss", "benign loss", ""):
        table.add_column(head, justify="right", no_wrap=True)
    for p in found.points:
        if p.figures:
            shares = (f"{p.figures[n].percent:.1f}" if n in p.figures else "–" for n in COLUMNS)
            nats = (f"{p.losses[n]:.3f}" if n in p.losses else "–" for n in ("hs", "fa", "benign"))
            table.add_row(f"{p.radius:.4g}", *shares, *nats, "chosen" if p.radius == found.radius else "")
    console.print(table)


def _plot(found: ChosenRadius, path: Path) -> None:
    """Figures above, losses below, over the radius; lines at the choice and where FA fails."""
    from matplotlib.figure import Figure  # slow to import; without pyplot no display is touched

    answered = [p for p in found.points if p.figures]
    plot = Figure(figsize=(8.0, 6.4), layout="constrained")
    shares, nats = plot.subplots(2, 1, sharex=True)
    line: dict[str, Any] = {"marker": "o", "markersize": 3.5}
    for name, colour in COLOURS.items():
        if name in answered[0].figures:
            values = [p.figures[name].percent for p in answered]
            shares.plot([p.radius for p in answered], values, color=colour, label=COLUMNS[name], **line)
    looked = [p for p in found.points if p.radius <= answered[-1].radius]
    for name, label in LOSSES.items():
        if name in looked[0].losses:
            values = [p.losses[name] for p in looked]
            nats.plot([p.radius for p in looked], values, color=COLOURS[name], label=label, **line)
    for axes in (shares, nats):
        axes.axvline(found.radius, color="black", linewidth=1.0, label="chosen")
        if (fails := found.failing()) is not None:
            axes.axvline(fails, color="#4477aa", linestyle="--", linewidth=1.0, label="FA out of its budget")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    shares.set(ylabel="held-out records (%)", ylim=(-3, 103))
    nats.set(xlabel="radius r: the model is w + r ε̂", ylabel="loss (nats a token)", xlim=(0, None))
    plot.savefig(path, dpi=150)
