"""Figures as a long table, one a line, that stands by itself: tables of other runs and other people go below it, line by line.

What a figure depends on besides the model is in its line, so whoever merges tables sees what may be compared: judge and version, prompts
(a hash), template and length must be equal.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from panacea_jax.evaluate.scores import Json
from panacea_jax.spreadsheet import as_csv_text

RESULT_COLUMNS = (
    "run", "set", "task", "figure", "category", "value", "low", "high", "n", "judge", "judge_version", "prompts", "template",
    "max_new_tokens", "temperature",
)  # fmt: skip
"""Of the table. ``value`` with its 95 % interval ``low`` to ``high``: shares in percent, means and distinct-n as in scores.json."""


def results_csv(runs: Mapping[str, Mapping[str, Json]]) -> str:
    """The table as CSV.

    Args:
        runs: content of scores.json by judge, by the name under which a run is shown.
    """
    lines = (line for run, results in runs.items() for result in results.values() for line in _lines(run, result))
    return as_csv_text([RESULT_COLUMNS, *([line.get(column) for column in RESULT_COLUMNS] for line in lines)])


def _lines(run: str, result: Json) -> Iterator[dict[str, Any]]:
    for name, scored in result["sets"].items():
        shared = {
            "run": run, "set": name, "task": scored["task"], "judge": result["judge"]["name"], "judge_version": result["judge"]["version"],
            "prompts": scored["prompts"], "template": result["template"], "max_new_tokens": scored["max_new_tokens"],
            "temperature": (result["decoding"] or {}).get("temperature"),
        }  # fmt: skip
        for figure, value in scored.items():
            if isinstance(value, float):
                yield shared | {"figure": figure, "value": value, "n": scored["n"]} | _interval(scored["ci95"].get(figure))
        for category, found in scored.get("categories", {}).items():
            yield shared | {"figure": "hs", "category": category, "value": found["hs"], "n": found["n"]} | _interval(found["ci95"])


def _interval(bounds: Any) -> dict[str, float]:
    return {"low": bounds[0], "high": bounds[1]} if bounds else {}
