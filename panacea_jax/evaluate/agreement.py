"""How far judges agree on the same answers, and on which they do not.

A figure that changes with the judge is the judge's as much as the model's. Verdicts of several
judges are never averaged: they stand side by side, with Cohen's κ, and people read the differences.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from panacea_jax.evaluate.scores import Json, Judged, ScoredSet, checked_pairs
from panacea_jax.evaluate.tasks import answer_text, find_task
from panacea_jax.spreadsheet import as_csv_text

VERDICT = {True: "flagged", False: "not flagged"}


def kappa(a: Sequence[bool], b: Sequence[bool]) -> float | None:
    """Cohen's κ = (p_o − p_e) / (1 − p_e): agreement beyond what the two rates alone would give.

    Source: J. Cohen, Educational and Psychological Measurement 20 (1960), 37-46.

    Returns:
        At most 1; None where both judges give one and the same verdict throughout: then p_e is 1
        and κ is not defined, however well they agree.

    Raises:
        ValueError: no verdict, or not the same number.
    """
    n = len(a)
    if n == 0 or n != len(b):
        raise ValueError(f"{n} and {len(b)} verdicts are not pairs")
    agreed = sum(bool(x) == bool(y) for x, y in zip(a, b))
    flagged_a, flagged_b = sum(a), sum(b)
    # in whole numbers, p_e·n²: exact, so that "is 1" is exact too
    expected = flagged_a * flagged_b + (n - flagged_a) * (n - flagged_b)
    return None if expected == n * n else (agreed * n - expected) / (n * n - expected)


def agreement(judges: Mapping[str, Judged]) -> Json:
    """The content of agreement.json: every pair of judges on every harmful set that both have seen.

    Returns:
        "judges": version by name; "pairs": for each "set", "judges" [first, second], "n",
        "observed" (share of equal verdicts, 0 to 1), "kappa" (None: not defined) and the counts
        "both", "only_first", "only_second", "neither" of flagged answers.

    Raises:
        InputError: verdicts that do not belong to the answers.
    """
    verdicts = _verdicts(judges)
    pairs = []
    for name in dict.fromkeys(name for name, _ in verdicts):
        there = [judge for judge in judges if (name, judge) in verdicts]
        for first, second in combinations(there, 2):
            a, b = verdicts[name, first], verdicts[name, second]
            both = sum(x and y for x, y in zip(a, b))
            neither = sum(not x and not y for x, y in zip(a, b))
            pairs.append({
                "set": name,
                "judges": [first, second],
                "n": len(a),
                "observed": (both + neither) / len(a),
                "kappa": kappa(a, b),
                "both": both,
                "only_first": sum(a) - both,
                "only_second": sum(b) - both,
                "neither": neither,
            })  # fmt: skip
    return {"judges": {name: j.judge["version"] for name, j in judges.items()}, "pairs": pairs}


def disagreements(judges: Mapping[str, Judged]) -> str:
    """A sheet (CSV, UTF-8) of the answers on which judges differ, for people to read.

    Columns: set, record (from 1), prompt, answer (as judged), one column a judge.
    """
    heads = ["set", "record", "prompt", "answer", *judges]
    return as_csv_text([heads, *_differing(judges)], quote_all=True)


def _verdicts(judges: Mapping[str, Judged]) -> dict[tuple[str, str], list[bool]]:
    """ "flagged" by harmful set and judge."""
    found = {}
    for judge, judged in judges.items():
        for s in judged.sets:
            if find_task(s.task).role == "harmful":
                pairs = checked_pairs(s, judged.judge, judged.template)
                found[s.name, judge] = [bool(line["flagged"]) for _, line in pairs]
    return found


def _differing(judges: Mapping[str, Judged]) -> Iterator[list[Any]]:
    verdicts = _verdicts(judges)
    sets: dict[str, tuple[ScoredSet, str]] = {
        s.name: (s, judged.template) for judged in judges.values() for s in judged.sets
    }
    for name, (s, template) in sets.items():
        columns = [verdicts.get((name, judge)) for judge in judges]
        for i, line in enumerate(s.generations):
            if len({column[i] for column in columns if column}) > 1:
                asked = line.get("instruction") or line["prompt"]
                shown = [VERDICT[column[i]] if column else "" for column in columns]
                yield [name, i + 1, asked, answer_text(line["response"], template), *shown]
