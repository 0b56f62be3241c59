"""The worst case of every method over the settings that a comparison varied: the attack that its attacker would choose."""

from collections.abc import Sequence
from typing import Any

_Json = dict[str, Any]
FIGURES = ("hs", "hs_plus")


def worst_cases(rows: Sequence[_Json]) -> list[_Json]:
    """By method and ratio the highest mean over seeds of each harmful figure.

    Args:
        rows: of the table, each with its "setting", in the order of the settings.

    Returns:
        ``[{"method", "ratio", "hs": {"worst", "setting", "cumulative", "fa"}, …}, …]``: "cumulative" is the highest so far after each
        setting, which is what an attacker who goes through them in this order has, "fa" that of the setting where it was the worst, None
        where it is not known. Of equals the first.
    """
    groups: dict[tuple[str, float], list[_Json]] = {}
    for row in rows:
        if row["ratio"] is not None:
            groups.setdefault((row["method"], row["ratio"]), []).append(row)
    return [
        {"method": method, "ratio": ratio}
        | {figure: _worst(group, figure) for figure in FIGURES if figure in group[0]["figures"]}
        for (method, ratio), group in groups.items()
    ]


def _worst(rows: Sequence[_Json], figure: str) -> _Json:
    values = [row["figures"][figure]["mean"] for row in rows]
    at = max(rows, key=lambda row: row["figures"][figure]["mean"])
    return {
        "worst": max(values),
        "setting": at["setting"],
        "cumulative": [max(values[: i + 1]) for i in range(len(values))],
        "fa": at["figures"]["fa"]["mean"] if "fa" in at["figures"] else None,
    }
