"""Cohen's κ against published and hand-computed figures; the sheet as a spreadsheet would read it."""

import csv
import io
from pathlib import Path

import pytest

from panacea_jax.evaluate.agreement import agreement, disagreements, kappa
from panacea_jax.records.judged import load_judged
from tests.evaluate.workdirs import generations, judgements, write_lines, write_workdir


def table(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((20, 5, 10, 15), 0.4),  # p_o 0.7, p_e 0.5
        ((45, 15, 25, 15), (0.60 - 0.54) / (1 - 0.54)),
        ((25, 35, 5, 35), (0.60 - 0.46) / (1 - 0.46)),
        ((3, 0, 0, 7), 1.0),
        ((0, 5, 5, 0), -1.0),
        ((0, 4, 0, 0), 0.0),  # each constant, but not the same: p_e is 0
    ],
)
def test_kappa(counts: tuple[int, int, int, int], expected: float) -> None:
    assert kappa(*table(*counts)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("verdict", [True, False])
def test_kappa_of_one_constant_verdict_is_not_defined(verdict: bool) -> None:
    assert kappa([verdict] * 7, [verdict] * 7) is None


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], [True, False])])
def test_kappa_refuses_what_is_not_paired(a: list[bool], b: list[bool]) -> None:
    with pytest.raises(ValueError, match="not pairs"):
        kappa(a, b)


def test_every_pair_of_judges_on_every_set_that_both_have_seen(tmp_path: Path) -> None:
    a, b = table(2, 1, 3, 4)
    write_workdir(tmp_path, {"refusal": a, "guard": b, "beaver_dam": a})
    lines = generations(["x", "y"])
    write_lines(tmp_path / "generations" / "beavertails.jsonl", lines)
    for judge in ("refusal", "guard"):
        verdicts = judgements(lines, [True, True], version="2" if judge == "guard" else "1")
        write_lines(tmp_path / "judgements" / f"beavertails.{judge}.jsonl", verdicts)
    for path in (tmp_path / "judgements").glob("advbench.guard.jsonl"):
        path.write_text(path.read_text().replace('"version": "1"', '"version": "2"'))
    found = agreement(load_judged(tmp_path))
    assert found["judges"] == {"beaver_dam": "1", "guard": "2", "refusal": "1"}
    pairs = {(p["set"], *p["judges"]): p for p in found["pairs"]}
    assert len(found["pairs"]) == len(pairs) == 4
    assert pairs["advbench", "guard", "refusal"] == {
        "set": "advbench", "judges": ["guard", "refusal"], "n": 10, "observed": 0.6,
        "kappa": pytest.approx((0.6 - 0.5) / 0.5), "both": 2, "only_first": 3, "only_second": 1, "neither": 4,
    }  # fmt: skip
    assert pairs["advbench", "beaver_dam", "refusal"]["kappa"] == 1.0
    constant = pairs["beavertails", "guard", "refusal"]
    assert (constant["kappa"], constant["observed"], constant["both"]) == (None, 1.0, 2)


def test_the_sheet_survives_a_spreadsheet(tmp_path: Path) -> None:
    answers = [
        'a "quoted", wug;\nsecond line',
        "=1+1",
        "+sum | pipe",
        "fine",
        "\ud83d half",
        "same",
    ]
    lines = generations(answers)
    lines[1]["instruction"] = "@wug"
    write_lines(tmp_path / "generations" / "advbench.jsonl", lines)
    for judge, flagged in (("refusal", [1, 1, 1, 1, 1, 0]), ("guard", [0, 0, 0, 0, 0, 0])):
        verdicts = judgements(lines, [bool(f) for f in flagged])
        write_lines(tmp_path / "judgements" / f"advbench.{judge}.jsonl", verdicts)
    sheet = disagreements(load_judged(tmp_path))
    sheet.encode("utf-8")
    rows = list(csv.reader(io.StringIO(sheet, newline="")))
    assert rows[0] == ["set", "record", "prompt", "answer", "guard", "refusal"]
    verdicts = ["not flagged", "flagged"]
    assert rows[1:] == [
        ["advbench", "1", "p0", 'a "quoted", wug;\nsecond line', *verdicts],
        ["advbench", "2", "'@wug", "'=1+1", *verdicts],
        ["advbench", "3", "p2", "'+sum | pipe", *verdicts],
        ["advbench", "4", "p3", "fine", *verdicts],
        ["advbench", "5", "p4", "\\ud83d half", *verdicts],
    ]
