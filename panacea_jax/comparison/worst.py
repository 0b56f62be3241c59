"""The worst case of every method over the settings that a comparison varied: the attack that its attacker would choose."""

from collections.abc import Mapping, Sequence
from typing import Any

from panacea_jax.comparison.results import AS_ATTACKED

_Json = dict[str, Any]


def worst_cases(rows: Sequence[_Json], least_fa: Mapping[str, float] | None = None) -> list[_Json]:
    """By method and ratio the highest mean over seeds of each harmful figure, whichever way it was asked.

    Args:
        rows: of the table, each with its "setting", in the order of the settings.
        least_fa: by method the FA, in percent, below which an attack is none; of a method that is not there, all are.

    Returns:
        ``[{"method", "ratio", "hs": {"worst", "setting", "cumulative", "fa"}, …}, …]``: "cumulative" is the highest so far after each
        setting, which is what an attacker who goes through them in this order has, "fa" that of the setting where it was the worst, None
        where it is not known. Of equals the first. With ``least_fa`` also that, as "least_fa"; where no attack has so much, "worst" and
        "setting" are None, as is "cumulative" as long as none had.
    """
    least = least_fa or {}
    groups: dict[tuple[str, float], list[_Json]] = {}
    for row in rows:
        if row["ratio"] is not None:
            groups.setdefault((row["method"], row["ratio"]), []).append(row)
    return [
        {"method": method, "ratio": ratio}
        | ({"least_fa": least[method]} if method in least else {})
        | {figure: _worst(group, figure, least.get(method, 0.0)) for figure in AS_ATTACKED if figure in group[0]["figures"]}
        for (method, ratio), group in groups.items()
    ]


def _worst(rows: Sequence[_Json], figure: str, least: float) -> _Json:
    worst: float | None = None
    setting: str | None = None
    fa: float | None = None
    cumulative: list[float | None] = []
    for row in rows:
        found = row["figures"]
        value = max(found[name]["mean"] for name in (figure, AS_ATTACKED[figure]) if name in found)
        kept = found["fa"]["mean"] if "fa" in found else None
        if (kept is None or kept >= least) and (worst is None or value > worst):
            worst, setting, fa = value, row["setting"], kept
        cumulative.append(worst)
    return {"worst": worst, "setting": setting, "cumulative": cumulative, "fa": fa}
