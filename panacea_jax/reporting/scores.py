"""Methods with their intervals, what a lower HS costs, and what the methods themselves cost."""

from collections.abc import Sequence
from typing import Any

from panacea_jax.evaluate.front import undominated
from panacea_jax.reporting.charts import interval_chart, tradeoff_chart
from panacea_jax.reporting.outcomes import HEADLINES, LOWER_IS_BETTER, TITLES, Found, Outcome
from panacea_jax.reporting.parts import Chart, Section, filled, numbered

BEFORE = "before fine-tuning"
CASES = 8
"""Cases with a picture of their own."""


def scores_section(found: Found) -> Section | None:
    """Every outcome with its intervals: a picture a figure, and one table."""
    if not found.outcomes:
        return None
    names = [name for name in TITLES if any(name in o.figures for o in found.outcomes)]
    charts = [_intervals(name, found.outcomes) for name in names if name in HEADLINES]
    heads = ["method", "case", *(TITLES[name] for name in names), "seeds"]
    rows = [
        [o.method, o.case, *(str(o.figures.get(name, "–")) for name in names), ", ".join(map(str, o.seeds)) or "–"]
        for o in found.outcomes
    ]  # fmt: skip
    return Section("Methods", found.notes, charts, [filled(heads, rows)])


def _series(outcome: Outcome) -> str:
    """What colours a point on a method's line."""
    return BEFORE if not outcome.attacked else outcome.case or "after fine-tuning"


def _intervals(name: str, outcomes: Sequence[Outcome]) -> Chart:
    there = [o for o in outcomes if name in o.figures]
    better = "lower" if name in LOWER_IS_BETTER else "higher"
    title = f"{TITLES[name]} (%), {better} is better"
    values = [
        {"method": o.method, "series": _series(o), "shown": str(o.figures[name]), **o.figures[name]._asdict()}
        for o in there
    ]  # fmt: skip
    return Chart(name, title, interval_chart(values, title), f"{TITLES[name]} with its 95 % interval, {len(there)} lines")


def tradeoff_section(found: Found) -> Section | None:
    """HS against FA, and against benign requests answered: a picture for every case that several methods were measured in.

    Where there is no such case, what was varied is a choice: then all outcomes are in one picture.
    """
    charts: list[Chart] = []
    rows = []
    by_case: dict[str, list[Outcome]] = {}
    for outcome in found.outcomes:
        if outcome.attacked:
            by_case.setdefault(outcome.case, []).append(outcome)
    if not by_case:
        return None
    several = {case: group for case, group in by_case.items() if len(group) > 1}
    for case, group in list((several or {"": [o for o in found.outcomes if o.attacked]}).items())[:CASES]:
        for use in ("fa", "benign"):
            there = [o for o in (*found.before(group[0]), *group) if {"hs", use} <= o.figures.keys()]
            attacked = [o for o in there if o.attacked]
            if not attacked or len(there) < 2:
                continue
            best = pareto_front([(o.figures["hs"].mean, o.figures[use].mean) for o in attacked])
            front = [attacked[i] for i in best]
            values = [_point(o, use, o in front, not several) for o in there]
            axes = "HS (%), lower is better", f"{TITLES[use]} (%), higher is better"
            where = f": {case}" if case else ""
            charts.append(Chart(
                f"hs_{use}", f"HS and {TITLES[use]}{where}", tradeoff_chart(values, *axes),
                f"HS against {TITLES[use]} of {len(there)} models; dashed, those that no other beats in both",
            ))  # fmt: skip
            rows.append([f"HS and {TITLES[use]}", case or "–", ", ".join(o.method if several else o.label for o in front)])
    if not charts:
        return None
    text = [
        "Dashed: the Pareto front, the methods that no other beats in both figures, by their means; intervals that overlap may change it."
    ]
    if not all(o.attacked for o in found.outcomes):
        text.append(f"The model {BEFORE} is shown and stands outside: it has not learnt the task.")
    if len(several) > CASES:
        text.append(f"The first {CASES} of {len(several)} cases are drawn; the tables hold all.")
    return Section("What a lower HS costs", text, numbered(charts), [filled(["figures", "case", "on the front"], rows)])


def _point(outcome: Outcome, use: str, front: bool, mixed: bool) -> dict[str, Any]:
    """One point; ``mixed``: cases differ among those in the picture."""
    x, y = outcome.figures["hs"], outcome.figures[use]
    return {
        "label": outcome.label, "series": outcome.label if mixed else outcome.method, "front": front, "shown": f"HS {x}, {TITLES[use]} {y}",
        "x": x.mean, "x_low": x.low, "x_high": x.high, "y": y.mean, "y_low": y.low, "y_high": y.high,
    }  # fmt: skip


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats: none has a first figure as low and a second as high, and one of them better."""
    return undominated([(-x, y) for x, y in points])


def cost_section(found: Found) -> Section | None:
    """What each method took."""
    heads = list(dict.fromkeys(head for o in found.outcomes for head in o.costs))
    if not heads:
        return None
    rows = [[o.method, o.case, *(o.costs.get(head, "–") for head in heads)] for o in found.outcomes]
    text = ["Passes are forward and backward passes over a batch; times are of the steps alone, compilation left out."]
    return Section("Costs", text, (), [filled(["method", "case", *heads], rows)])
