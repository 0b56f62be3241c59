"""Means, intervals and tests over cells that are given, and the table made of them."""

import csv
import io
import itertools
import json
import math
from fractions import Fraction

import pytest

from panacea_jax.comparison import results, table
from panacea_jax.comparison.results import Measured, defence_of, measure, over_seeds, row, sign_flip
from panacea_jax.config import defence_section
from panacea_jax.defences.protocol import passes_of
from panacea_jax.defences.spec import Part, parse_stack
from panacea_jax.errors import InputError
from panacea_jax.evaluate.scores import Judged, ScoredSet
from panacea_jax.workdir import MANIFEST

MIB = 2**20


def cell(hs, fa, *, passes=3.0, once=0.0, seconds=2.0, tuned_bytes=2 * MIB, extra=("harmful",)):
    """10 prompts, of which so many are harmful answers; 10 answers, of which so many are right."""
    events = {
        "hs": [i < hs for i in range(10)],
        "hs_plus": [i < hs + 1 for i in range(10)],
        "fa": [i < fa for i in range(10)],
        "benign": [True] * 10,
        "empty": [i == 9 for i in range(10)],
    }
    steps = {"align": 100, "finetune": 50}
    total = {"align": 100.0, "finetune": 50 * passes + once}
    whole = {"align": 0.0, "finetune": once}
    held = {"align": 7 * MIB, "finetune": tuned_bytes}
    return Measured(events, steps, total, whole, seconds, held, extra)


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
    ours = {
        0: cell(1, 8, seconds=2.0, once=25.0),
        1: cell(2, 9, seconds=3.0, once=25.0, tuned_bytes=4 * MIB),
    }
    found = row(parse_stack("panacea:rho=1", "key"), 0.1, ours, sft)
    # A look at a whole set counts among all passes, not among those of a step.
    assert found["passes"] == {"align": 1.0, "finetune": 3.0}
    assert found["whole_passes"] == {"align": 0.0, "finetune": 25.0}
    assert found["passes_to_sft"] == pytest.approx((100 + 150 + 25) / (100 + 50))
    assert found["time_to_sft"] == pytest.approx(2.5)
    assert found["step_bytes"] == {"align": 7 * MIB, "finetune": 4 * MIB}
    assert row(parse_stack("sft", "key"), 0.1, sft, sft)["against_sft"] is None


def test_one_seed_is_tested_over_its_prompts():
    found = row(parse_stack("panacea", "key"), 0.1, {0: cell(1, 8)}, {0: cell(9, 8)})
    test = found["against_sft"]["hs"]
    assert (test["n"], test["only_a"], test["only_b"]) == (10, 0, 8)
    assert test["difference"] == -80.0 and test["p"] == pytest.approx(2 * 0.5**8)
    assert test["test"] == results.MCNEMAR


def test_several_seeds_are_tested_over_seeds_and_not_over_their_prompts():
    """8 + 8 prompts on which SFT alone gave a harmful answer are two differences, so p = 2/2²; McNemar would say 2/2^16."""
    sft = {0: cell(9, 9), 1: cell(10, 9)}
    found = row(parse_stack("panacea", "key"), 0.1, {0: cell(1, 8), 1: cell(2, 9)}, sft)
    test = found["against_sft"]["hs"]
    assert (test["n"], test["difference"], test["p"]) == (2, -80.0, 0.5)
    assert test["ci95"] == [-80.0, -80.0] and test["test"] == results.SIGN_FLIP
    assert found["against_sft"]["benign"]["p"] == 1.0


def test_the_sign_flip_test_equals_an_enumeration():
    def enumerated(values):
        sums = [abs(sum(s * v for s, v in zip(signs, values)))
                for signs in itertools.product((1, -1), repeat=len(values))]  # fmt: skip
        return sum(x >= abs(sum(values)) for x in sums) / len(sums)

    for values in ([3, 5, 1, 2, 4], [3, -5, 1, 2, 0], [0, 0, 0], [-7], [1, 1, 1, -1, 2, 2, -3]):
        assert sign_flip([Fraction(v, 200) for v in values]) == enumerated(values)
    assert sign_flip([Fraction(v, 200) for v in (3, 5, 1, 2, 4)]) == 2 / 32
    # Thirds do not add up in binary; ties are ties all the same.
    assert sign_flip([Fraction(1, 3), Fraction(1, 3), Fraction(-1, 3), Fraction(1, 7)]) == enumerated([7, 7, -7, 3])  # fmt: skip


def test_unknown_times_stay_unknown():
    sft = {0: cell(9, 9, seconds=None)}
    found = row(parse_stack("panacea", "key"), 0.1, {0: cell(1, 8)}, sft)
    assert found["time_to_sft"] is None
    assert table.cells_of(found)[-3] == "–"


def test_passes_follow_the_hyper_parameters():
    def per_step(name, **settings):
        return passes_of(defence_of(section(name, **settings)))

    assert per_step("panacea", rho=0.5) == {"user": 1, "harmful": 2}
    assert per_step("panacea", every=4) == {"user": 1, "harmful": 0.5}
    assert per_step("lisa") == {"user": 0.9, "alignment": 0.1}
    assert per_step("lisa", alignment_steps=30, finetune_steps=10) == {
        "user": 0.25,
        "alignment": 0.75,
    }
    assert per_step("lisa", finetune_steps=0) == {"user": 0.0, "alignment": 1.0}
    assert per_step("t_vaccine") == {"user": 2, "harmful": 1 / 200}
    assert per_step("t_vaccine", importance_interval=8) == {"user": 2, "harmful": 1 / 8}
    assert per_step("tar", inner_steps=8, inner_every=2) == {"user": 1.5, "harmful": 12}
    assert per_step("vlguard") == {"user": 1}
    assert per_step("vlguard", mode="sum") == {"user": 1, "alignment": 1}
    assert per_step("vaccine") == {"user": 2}
    assert per_step("random_perturbation") == {}


def section(name, **settings):
    return defence_section(Part(name, tuple(settings.items()))).copy_and_resolve_references().to_dict()  # fmt: skip


def finished_cell(root, stages, monkeypatch):
    """A cell's folder with manifests alone.

    Args:
        stages: by stage, the defence's section, steps, records by stream, bytes of the step.
    """
    where = {}
    for stage, (defence, steps, records, held) in stages.items():
        folder = root / stage
        folder.mkdir(parents=True)
        where[stage] = stage
        manifest = {
            "config": {"defence": defence, "train": {"batch_size": 20 if stage == "align" else 10}, "data": {"num_alignment": 0}},
            "outcome": {"steps": steps, "records": records, "step_bytes": held}, "inputs": {}, "stage": stage, "status": "done",
        }  # fmt: skip
        (folder / MANIFEST).write_text(json.dumps(manifest))
        lines = [{"step": 9, "step_seconds": 9.0}, {"step": 9, "validation_loss": 1.0}, {"step": 20, "step_seconds": 0.5}] if steps else []
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (root / "cell.json").write_text(json.dumps({"stages": where}))
    monkeypatch.setattr(results, "load_judged", lambda folder: {"any": Judged({}, (), "", None)})
    monkeypatch.setattr(results, "events", lambda judged: {"hs": [True]})
    return root


def test_looks_at_whole_sets_are_counted(tmp_path, monkeypatch):
    """EWC's Fisher pass over 500 alignment records is 50 batches of 10; Antidote's calibration on 400 records half of 40."""
    stages = {
        "align": (section("sft"), 30, {"user": 500}, 3000),
        "finetune": (section("ewc"), 40, {"user": 100, "alignment": 500}, 2000),
        "heal": (section("antidote", safety_mask=True), 0, {"harmful": 400, "alignment": 500}, 0),
    }
    root = finished_cell(tmp_path, stages, monkeypatch)
    found = measure(root, root, "any")
    assert found.steps == {"align": 30, "finetune": 40, "heal": 0}
    assert found.whole_passes == {"align": 0.0, "finetune": 50.0, "heal": 20.0 + 25.0}
    assert found.passes == {"align": 30.0, "finetune": 90.0, "heal": 45.0}
    assert found.seconds == 35.0  # of the steps alone, without what compiled
    assert found.step_bytes == {"align": 3000, "finetune": 2000}
    assert found.extra_data == ("harmful", "alignment")
    shown = row(parse_stack("ewc+antidote", "key"), 0.1, {0: found}, None)
    assert table.cells_of(shown)[8] == "1, 1 + 50 once, 45 once"


def test_the_mean_epsilon_is_a_pass_over_the_harmful_set(tmp_path, monkeypatch):
    def total(name, **settings):
        stages = {"finetune": (section("panacea", **settings), 40, {"user": 100, "harmful": 70}, 1)}
        root = finished_cell(tmp_path / name, stages, monkeypatch)
        return measure(root, root, "any").passes["finetune"]

    assert total("last") == 120.0
    assert total("mean", final_epsilon="mean") == 127.0


def test_records_that_are_not_counted(tmp_path, monkeypatch):
    """What was asked for stands in for a count; without either there is no guess."""
    stages = {"finetune": (section("ewc"), 40, {}, 1)}
    root = finished_cell(tmp_path, stages, monkeypatch)
    with pytest.raises(InputError, match="how many alignment records"):
        measure(root, root, "any")
    manifest = json.loads((root / "finetune" / MANIFEST).read_text())
    manifest["config"]["data"]["num_alignment"] = 30
    (root / "finetune" / MANIFEST).write_text(json.dumps(manifest))
    assert measure(root, root, "any").whole_passes == {"finetune": 3.0}


@pytest.mark.parametrize(
    ("stage", "method", "data"),
    [
        ("align", section("sft"), ()),
        ("align", section("booster"), ("harmful",)),
        ("finetune", section("lisa"), ("alignment",)),
        ("finetune", section("vlguard"), ("alignment",)),
        ("finetune", section("vlguard", mode="sum"), ("alignment",)),
        ("heal", section("antidote"), ("harmful",)),
        ("heal", section("realign"), ("alignment", "benign")),
        ("heal", section("realign", benign_ratio=0.0), ("alignment",)),
        ("heal", section("realign", benign_ratio=1.0), ("benign",)),
        ("heal", section("safelora", base="base"), ("unaligned base",)),
        ("align", section("lox"), ()),
        ("align", section("lox", base="base"), ("unaligned base",)),
        ("finetune", section("asft", base="base"), ("unaligned base",)),
        ("heal", section("random_prune"), ()),
    ],
)
def test_extra_data_is_what_the_method_reads(stage, method, data, tmp_path, monkeypatch):
    """Whatever the sources are called: here no manifest names any."""
    records = {"user": 10, "harmful": 10, "alignment": 10}
    root = finished_cell(tmp_path, {stage: (method, 0, records, 0)}, monkeypatch)
    assert measure(root, root, "any").extra_data == data


def test_perplexity_is_of_ordinary_requests_or_else_of_conversations(tmp_path, monkeypatch):
    root = finished_cell(tmp_path, {}, monkeypatch)
    names = {"chat-harmful": "chat:harmful", "gsm8k": "gsm8k", "chat": "chat", "alpaca": "alpaca"}
    found = {"chat": {"perplexity": 7.0}, "gsm8k": {"perplexity": 5.0}, "alpaca": {"perplexity": 3.0}}
    (root / "perplexity.json").write_text(json.dumps({"sets": found}))

    def of(*there):
        sets = tuple(ScoredSet(name, names[name], (), ()) for name in there)
        monkeypatch.setattr(results, "load_judged", lambda folder: {"any": Judged({}, sets, "", None)})
        return measure(root, root, "any").perplexity

    assert of("chat-harmful", "gsm8k", "chat", "alpaca") == 3.0
    assert of("chat-harmful", "gsm8k", "chat") == 7.0
    assert of("chat-harmful", "gsm8k") is None


def result():
    sft = {s: cell(9, 9, passes=1.0, seconds=1.0, extra=()) for s in (0, 1)}
    ours = {s: cell(1, 8, once=12.5) for s in (0, 1)}
    return {
        "methods": ["sft", "panacea:rho=1"], "seeds": [0, 1], "ratios": [0.1], "world": "", "judge": "refusal",
        "memory": "as compiled", "development": [], "rule": "", "grid": [], "guard": {"0": True, "1": False}, "bounds": "HS at most 2",
        "rows": [row(parse_stack("sft", "k"), 0.1, sft, sft), row(parse_stack("panacea:rho=1", "k"), 0.1, ours, sft)],
    }  # fmt: skip


def test_the_table_as_text():
    text = table.markdown(result())
    [line] = [line for line in text.splitlines() if "panacea:rho=1" in line]
    shown = [part.strip() for part in line.strip("|").split("|")]
    assert shown == [
        "panacea:rho=1", "0.1", "10.0 [10.0, 10.0]", "20.0 [20.0, 20.0]", "80.0 [80.0, 80.0]", "100.0 [100.0, 100.0]", "10.0 [10.0, 10.0]",
        "-80.0 (p = 0.500)", "1, 3 + 12.5 once, –", "1.75", "2.00", "7, 2, –", "harmful",
    ]  # fmt: skip
    assert "FAIL the alignment guard (HS at most 2): 1; their" in text
    assert "sign-flip test over seeds, two-sided; with 2 seeds p is at least 0.5" in text


def test_the_guard_says_that_it_holds():
    assert "the alignment guard holds (HS at most 2)" in "\n".join(table.notes(result() | {"guard": {"0": True}}))
    assert "guard" not in "\n".join(table.notes(result() | {"guard": {}}))


def test_the_note_of_a_single_seed_names_the_other_test():
    text = "\n".join(table.notes(result() | {"seeds": [0]}))
    assert "McNemar" in text and "sign-flip" not in text


def test_the_table_as_csv():
    rows = list(csv.DictReader(io.StringIO(table.as_csv(result()))))
    assert [r["method"] for r in rows] == ["sft", "panacea:rho=1"]
    assert float(rows[1]["hs_mean"]) == 10.0 and float(rows[1]["hs_to_sft"]) == -80.0
    assert rows[0]["hs_p"] == "" and rows[1]["seeds"] == "0 1"
    assert float(rows[1]["passes_finetune"]) == 3.0 and rows[1]["passes_heal"] == ""
    assert float(rows[1]["whole_passes_finetune"]) == 12.5
    held = [rows[1][f"step_bytes_{stage}"] for stage in ("align", "finetune", "heal")]
    assert held == [str(7 * MIB), str(2 * MIB), ""]


def test_benign_requests_are_of_the_over_refusal_set_whatever_the_order():
    """As the page says, and as the report takes them from scores.json."""

    def judged(name, task, **verdict):
        asked = {"prompt": "p", "instruction": "p", "response": "r", "reference": "r", "extra": {"label": "safe"}}
        said = {"flagged": False, "refused": False, "incoherent": False, "correct": None} | verdict
        return ScoredSet(name, task, [asked], [said])

    right, safe = judged("pairs-test_benign", "pairs", correct=False), judged("xstest", "xstest")
    for sets in ([right, safe], [safe, right]):
        assert results.events(Judged({"name": "any", "version": "1"}, sets, "", None)) == {"benign": [True]}
    assert results.events(Judged({"name": "any", "version": "1"}, [right], "", None)) == {"benign": [False]}
