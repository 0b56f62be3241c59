"""The picture of a training stage: its losses over its steps."""

import itertools
from pathlib import Path

from panacea_jax.analysis.layer_pictures import COLOURS
from panacea_jax.train.metrics import read_metrics


def plot_losses(folder: Path) -> None:
    """Draw every loss that was logged in a stage's folder into its ``loss.png``, the task's first; nothing where none was."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(folder):
        for name, value in row.items():
            if "loss" in name and value is not None:
                curves.setdefault(name, []).append((row["step"], value))
    if not curves:
        return
    from matplotlib.figure import Figure  # slow to import; without pyplot no display is touched

    plot = Figure(figsize=(7.0, 4.0))
    axes = plot.add_subplot()
    for name, colour in zip(sorted(curves, key=lambda name: (name != "loss", name)), itertools.cycle(COLOURS)):
        steps, values = zip(*curves[name])
        axes.plot(steps, values, label=name.replace("_", " "), color=colour, marker="o", markersize=2)
    axes.set(xlabel="step", ylabel="loss", title="/".join(folder.absolute().parts[-2:]))
    axes.legend(frameon=False)
    plot.savefig(folder / "loss.png", dpi=120)
