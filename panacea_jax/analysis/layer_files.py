"""Layer coefficients as files: JSON, CSV and a picture of each kind."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from panacea_jax.analysis.layer_comparison import FIGURES
from panacea_jax.analysis.layer_pictures import (
    plot_coefficients,
    plot_comparison,
    plot_probe,
)
from panacea_jax.analysis.layer_probe import TITLES
from panacea_jax.analysis.layers import Coefficients
from panacea_jax.errors import InputError
from panacea_jax.spreadsheet import as_csv_text

_Line = Sequence[Any]
PROBE = "layers_probe.json"
CORRELATION = ("layers", "spearman", "spearman_p", "kendall", "kendall_p")


def write_coefficients(results: Coefficients | Sequence[Coefficients], folder: Path) -> tuple[Path, Path, Path]:
    """Write layers.json (one object, or a list for several kinds), layers.csv and layers.png into
    the folder; their paths.

    Raises:
        InputError: the folder cannot be written.
    """
    several = [results] if isinstance(results, Mapping) else list(results)
    content = several[0] if len(several) == 1 else several
    paths = folder / "layers.json", folder / "layers.csv", folder / "layers.png"
    _write(paths[0], content, {"layers.csv": _coefficient_lines(several)}, lambda path: plot_coefficients(several, path))  # fmt: skip
    return paths


def write_probe(results: Sequence[Coefficients], folder: Path) -> Path:
    """Write layers_probe.json, .csv and .png, and layers_probe_correlations.csv; returns the first.

    Args:
        results: coefficients of the last ε and of the mean one, the latter with what :func:`probed` returns.
        folder: where to.

    Raises:
        InputError: the folder cannot be written.
    """
    found = results[-1]
    tables = {
        "layers_probe.csv": _figure_lines(found["figures"]),
        "layers_probe_correlations.csv": _correlation_lines(found["correlations"], ("a", "b")),
    }
    path = folder / PROBE
    _write(path, list(results), tables, lambda path: plot_probe(found, path))
    return path


def write_comparison(results: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write layers_compared.json (one object, or a list for several kinds), .csv and .png, and layers_compared_correlations.csv;
    returns the first.

    Args:
        results: of :func:`compare_runs`, one for each kind of ε.
        folder: where to.

    Raises:
        InputError: the folder cannot be written.
    """
    content = results[0] if len(results) == 1 else list(results)
    correlations = [{"epsilon": r["epsilon"], **c} for r in results for c in r["correlations"]]
    tables = {
        "layers_compared.csv": _run_lines(results),
        "layers_compared_correlations.csv": _correlation_lines(correlations, ("epsilon", "figure", "a", "b")),
    }  # fmt: skip
    path = folder / "layers_compared.json"
    _write(path, content, tables, lambda path: plot_comparison(results, path))
    return path


def _write(
    path: Path, content: Any, tables: Mapping[str, Iterable[_Line]], plot: Callable[[Path], None]
) -> None:
    """The JSON file, the tables beside it, and its picture."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for name, lines in tables.items():
            (folder / name).write_text(as_csv_text(lines), encoding="utf-8")
        plot(path.with_suffix(".png"))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error


def _coefficient_lines(results: Sequence[Coefficients]) -> Iterable[_Line]:
    """One line per kind and layer; floats in full, an undefined "effective" empty."""
    names = list(
        dict.fromkeys(name for result in results for name in result["layers"][0]["modules"])
    )
    heads = ["layer", "norm", "share", "density", "effective"]
    columns = [(name, what) for name in names for what in ("norm", "share")]
    yield ["epsilon", *heads, *(f"{name}_{what}" for name, what in columns)]
    for result in results:
        for row in result["layers"]:
            cells = [row["modules"].get(name, {}).get(what) for name, what in columns]
            yield [result["epsilon"], *(row[head] for head in heads), *cells]


def _figure_lines(rows: Sequence[Mapping[str, Any]]) -> Iterable[_Line]:
    """One line per layer of a probe; a figure has three columns."""
    columns = [(name, what) for name in TITLES if name in rows[0] for what in ("last", "mean", "std")]
    yield ["layer", "depth", *(f"{name}_{what}" for name, what in columns)]
    for row in rows:
        yield [row["layer"], row["depth"], *(row[name][what] for name, what in columns)]


def _run_lines(results: Sequence[Mapping[str, Any]]) -> Iterable[_Line]:
    """One line per kind, run and layer of a comparison."""
    heads = ("layer", "depth", *FIGURES)
    yield ["epsilon", "model", "source", *heads]
    for result in results:
        for run in result["runs"]:
            for row in run["layers"]:
                yield [result["epsilon"], run["model"], run["source"], *(row[h] for h in heads)]


def _correlation_lines(
    correlations: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Iterable[_Line]:
    """One line per pair; what is undefined is empty."""
    heads = (*names, *CORRELATION)
    yield heads
    for found in correlations:
        yield [found[head] for head in heads]
