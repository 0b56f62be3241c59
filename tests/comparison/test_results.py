"""Means, intervals and tests over cells that are given, and the table made of them."""

import csv
import io
import math

import pytest

from panacea_jax.comparison import table
from panacea_jax.comparison.results import Measured, over_seeds, passes_per_step, row
from panacea_jax.config import defence_section
from panacea_jax.defences.spec import Part, parse_stack


def cell(hs, fa, *, passes=3.0, seconds=2.0, step_bytes=2**21, extra=("harmful",)):
    """10 prompts, of which so many are harmful answers; 10 answers, of which so many are right."""
    events = {
        "hs": [i < hs for i in range(10)],
        "hs_plus": [i < hs + 1 for i in range(10)],
        "fa": [i < fa for i in range(10)],
        "benign": [True] * 10,
    }
    steps = {"align": 100, "finetune": 50}
    return Measured(
        events, steps, {"align": 100.0, "finetune": 50 * passes}, seconds, step_bytes, extra
    )


def test_one_seed_has_wilsons_interval_over_prompts():
    found = over_seeds({0: cell(3, 8)})["hs"]
    assert (found["mean"], found["by_seed"], found["worst"]) == (30.0, {"0": 30.0}, 30.0)
    z = 1.959963984540054
    centre = (0.3 + z * z / 20) / (1 + z * z / 10)
    half = z * math.sqrt(0.3 * 0.7 / 10 + z * z / 400) / (1 + z * z / 10)
    assert found["ci95"] == pytest.approx([100 * (centre - half), 100 * (centre + half)])


def test_several_seeds_have_an_interval_over_seeds():
    found = over_seeds({0: cell(0, 8), 1: cell(10, 6)})
    assert found["hs"]["mean"] == 50.0 and found["hs"]["ci95"] == [0.0, 100.0]
    assert found["hs"]["worst"] == 100.0 and found["fa"]["worst"] == 60.0
    assert found["benign"]["ci95"] == [100.0, 100.0]


def test_a_row_is_paired_with_sft_and_costs_in_its_terms():
    sft = {0: cell(9, 9, passes=1.0, seconds=1.0), 1: cell(10, 9, passes=1.0, seconds=1.0)}
    ours = {0: cell(1, 8, seconds=2.0), 1: cell(2, 9, seconds=3.0, step_bytes=2**22)}
    found = row(parse_stack("panacea:rho=1", "key"), 0.1, ours, sft)
    assert found["passes"] == {"align": 1.0, "finetune": 3.0}
    assert found["passes_to_sft"] == pytest.approx((100 + 150) / (100 + 50))
    assert found["time_to_sft"] == pytest.approx(2.5) and found["step_bytes"] == 2**22
    test = found["against_sft"]["hs"]
    # 8 + 8 prompts on which SFT alone gave a harmful answer: p = 2 · 2^-16.
    assert (test["n"], test["only_a"], test["only_b"]) == (20, 0, 16)
    assert test["difference"] == -80.0 and test["p"] == pytest.approx(2 * 0.5**16)
    assert row(parse_stack("sft", "key"), 0.1, sft, sft)["against_sft"] is None


def test_unknown_times_stay_unknown():
    sft = {0: cell(9, 9, seconds=None)}
    found = row(parse_stack("panacea", "key"), 0.1, {0: cell(1, 8)}, sft)
    assert found["time_to_sft"] is None
    assert table.cells_of(found)[-3] == "–"


def test_passes_follow_the_hyper_parameters():
    def per_step(name, **settings):
        part = Part(name, tuple(settings.items()))
        return passes_per_step(defence_section(part).copy_and_resolve_references().to_dict())

    assert per_step("panacea", rho=0.5) == 3.0
    assert per_step("vaccine") == 2.0
    assert per_step("random_perturbation") == 0.0


def result():
    sft = {s: cell(9, 9, passes=1.0, seconds=1.0, extra=()) for s in (0, 1)}
    ours = {s: cell(1, 8) for s in (0, 1)}
    return {
        "methods": ["sft", "panacea:rho=1"], "seeds": [0, 1], "ratios": [0.1], "world": "", "judge": "refusal",
        "memory": "as compiled", "development": [], "rule": "", "grid": [], "guard": {"0": True, "1": False},
        "rows": [row(parse_stack("sft", "k"), 0.1, sft, sft), row(parse_stack("panacea:rho=1", "k"), 0.1, ours, sft)],
    }  # fmt: skip


def test_the_table_as_text():
    text = table.markdown(result())
    [line] = [line for line in text.splitlines() if "panacea:rho=1" in line]
    shown = [part.strip() for part in line.strip("|").split("|")]
    assert shown == [
        "panacea:rho=1", "0.1", "10.0 [10.0, 10.0]", "20.0 [20.0, 20.0]", "80.0 [80.0, 80.0]", "100.0 [100.0, 100.0]",
        "-80.0 (p < 0.001)", "1, 3, –", "1.67", "2.00", "2", "harmful",
    ]  # fmt: skip
    assert "FAIL the alignment guard" in text and ": 1; their" in text


def test_the_table_as_csv():
    rows = list(csv.DictReader(io.StringIO(table.as_csv(result()))))
    assert [r["method"] for r in rows] == ["sft", "panacea:rho=1"]
    assert float(rows[1]["hs_mean"]) == 10.0 and float(rows[1]["hs_to_sft"]) == -80.0
    assert rows[0]["hs_p"] == "" and rows[1]["seeds"] == "0 1"
    assert float(rows[1]["passes_finetune"]) == 3.0 and rows[1]["passes_heal"] == ""
