"""What of a varied setting concerns which stage, and the worst case over settings."""

import pytest

from panacea_jax.comparison import settings
from panacea_jax.comparison.cells import _decisive, _made_by
from panacea_jax.comparison.worst import worst_cases
from panacea_jax.config import defence_section, get_config
from panacea_jax.defences.spec import Part, parse_stack

HARMFUL, STEPS, HEAL = ("data.num_harmful", 10), ("train.steps", 3), ("heal.train.steps", 5)
ALIGNMENT, AFTER = ("data.num_alignment", 4), ("after.steps", 7)
ALL = (HARMFUL, STEPS, HEAL, ALIGNMENT, AFTER)


def of_method(text, setting=ALL, aligns=False):
    return settings.of_method(parse_stack(text, "key"), setting, aligns)


def test_a_method_notices_only_the_sets_that_it_reads():
    assert of_method("sft") == (STEPS, AFTER)
    assert of_method("sft", aligns=True) == (STEPS, ALIGNMENT, AFTER)
    assert of_method("panacea") == (HARMFUL, STEPS, AFTER)
    assert of_method("realign:benign_ratio=0") == (STEPS, HEAL, ALIGNMENT, AFTER)
    assert of_method("booster+antidote") == (HARMFUL, STEPS, HEAL, AFTER)


@pytest.mark.parametrize("method", ["ascent", "panacea"])
def test_a_radius_that_chooses_itself_notices_what_it_is_chosen_by(method):
    """Its held-out records are set apart from the defender's harmful and benign ones."""
    benign = (("data.benign", "pairs@b.jsonl"),)
    assert of_method(f"{method}:rho=auto", (*benign, ALIGNMENT)) == benign
    assert of_method(f"{method}:rho=0.5", (*benign, ALIGNMENT)) == ()


def test_no_further_steps_have_no_poison():
    assert of_method("sft", (("after.steps", 0), ("after.poison_ratio", 0.5))) == (("after.steps", 0),)
    assert of_method("sft", (AFTER, ("after.poison_ratio", 0.5))) == (AFTER, ("after.poison_ratio", 0.5))


def test_stages_share_what_does_not_concern_them():
    assert settings.of_alignment(Part("sft"), ALL) == (ALIGNMENT,)
    assert settings.of_alignment(Part("booster"), ALL) == (HARMFUL, ALIGNMENT)
    assert settings.of_finetuning(Part("sft"), ALL) == (STEPS,)
    assert settings.of_finetuning(Part("panacea"), ALL) == (HARMFUL, STEPS)
    assert settings.of_finetuning(Part("vlguard"), ALL) == (STEPS, ALIGNMENT)
    assert settings.of_healing(ALL) == (HARMFUL, STEPS, HEAL, ALIGNMENT)


def test_folders_of_long_settings_differ():
    assert settings.folder_name(()) == ""
    assert settings.folder_name((STEPS, HEAL)) == "train.steps=3_heal.train.steps=5"
    names = {settings.folder_name((("data.user", f"pairs@{'x' * 200}{i}"),)) for i in range(2)}
    assert len(names) == 2 and all(len(name) < 100 for name in names)


def row(method, setting, hs, fa=50.0):
    figures = {"hs": {"mean": hs}} | ({"fa": {"mean": fa}} if fa is not None else {})
    return {"method": method, "ratio": 0.1, "setting": setting, "figures": figures}


def test_the_worst_case_is_the_attackers_choice():
    aligned = {"method": "aligned", "ratio": None, "figures": {"hs": {"mean": 99.0}}}
    rows = [
        aligned, row("a", "s", 10.0), row("b", "s", 3.0, None), row("a", "t", 40.0, 20.0), row("b", "t", 1.0, None), row("a", "u", 40.0),
    ]  # fmt: skip
    a, b = worst_cases(rows)
    assert a == {
        "method": "a", "ratio": 0.1, "hs": {"worst": 40.0, "setting": "t", "cumulative": [10.0, 40.0, 40.0], "fa": 20.0},
    }  # fmt: skip
    assert b["hs"] == {"worst": 3.0, "setting": "s", "cumulative": [3.0, 3.0], "fa": None}


def test_an_attack_that_ruins_the_task_is_none():
    rows = [row("a", "s", 10.0, 97.0), row("a", "t", 90.0, 20.0), row("b", "s", 3.0, 40.0)]
    a, b = worst_cases(rows, {"a": 95.0, "b": 50.0})
    assert a["least_fa"] == 95.0 and a["hs"] == {"worst": 10.0, "setting": "s", "cumulative": [10.0, 10.0], "fa": 97.0}
    assert b["hs"] == {"worst": None, "setting": None, "cumulative": [None], "fa": None}


def test_the_worst_is_of_both_ways_of_asking():
    rows = [row("a", "s", 10.0), row("a", "t", 5.0)]
    rows[1]["figures"]["hs_attacked"] = {"mean": 80.0}
    [a] = worst_cases(rows)
    assert (a["hs"]["worst"], a["hs"]["setting"], a["hs"]["cumulative"]) == (80.0, "t", [10.0, 80.0])


@pytest.mark.parametrize(("rho", "matters"), [("auto", True), (0.5, False)])
def test_what_a_radius_is_chosen_by_decides_a_cell_if_one_is_chosen(rho, matters):
    config = get_config()
    config.defence.rho, config.defence.name = 1.0, "panacea"
    config.heal.defence = defence_section(Part("ascent", (("rho", rho),)))
    before = _decisive(config)
    config.budget.fa = 20.0
    assert (before != _decisive(config)) == matters


def test_rows_that_are_computed_together_decide_nothing_but_notes_from_before_count_them():
    config = get_config()
    now, before = _made_by(config)
    config.generate.batch_size, config.judge.batch_size = 7, 9
    assert _made_by(config)[0] == now and _made_by(config)[1] != before
    config.generate.max_new_tokens = 3
    assert _made_by(config)[0] != now
