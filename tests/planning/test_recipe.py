"""The cost of a whole recipe against sums by hand."""

import json

import pytest

from panacea_jax import cli
from panacea_jax.parallel.chips import CHIPS
from panacea_jax.planning.prices import PRICES
from panacea_jax.planning.recipe import RecipePhase
from panacea_jax.planning.topology import Topology
from panacea_jax.stages import plan as plan_command
from tests.on_devices import on_devices
from tests.planning.test_plan import CONFIG, TINY
from tests.tiny import write_pairs


@pytest.fixture
def planned(tmp_path):
    """``plan`` of a model on one H100, with more flags: its plan, its phases by name, and all that the recipe's file holds."""

    def run(model, *flags):
        (tmp_path / "config.json").write_text(json.dumps(model))
        arguments = [f"--config.model.path={tmp_path}", "--topology=gpu:h100x1", f"--workdir={tmp_path}/out", *flags]
        assert cli.run(["plan", *arguments]) == 0
        [plan, *_] = json.loads((tmp_path / "out" / "plan.json").read_text())
        recipe = json.loads((tmp_path / "out" / "plan_recipe.json").read_text())
        return plan, {phase["name"]: phase for phase in recipe["phases"]}, recipe

    return run


WHOLE = (
    "--config.data.user=gsm8k@someone/sums", "--config.data.num_examples=1003", "--config.data.num_alignment=5000",
    "--config.data.max_length=128", "--config.align.defence.name=sft", "--config.train.epochs=2",
    "--config.heal.methods=('realign:steps=50','safelora:base=there')",
)  # fmt: skip


def test_the_recipe_is_its_steps_and_its_answers(planned, capsys):
    tasks = "--config.eval.tasks=('gsm8k:panacea-1000@someone/sums',)"
    plan, phases, recipe = planned(CONFIG, *WHOLE, tasks, "--config.train.full_parameters=False")
    assert list(phases) == ["align sft", "finetune panacea", "heal realign", "heal safelora", "generate gsm8k-panacea-1000"]
    # 5000 records ten at a time, twenty times; 1003 make 101 steps, twice.
    assert phases["align sft"]["work"].startswith("10000 steps")
    assert phases["finetune panacea"]["work"].startswith("202 steps")
    assert phases["finetune panacea"]["seconds"] == pytest.approx(202 * plan["step_seconds"])
    # SFT makes one of Panacea's three passes, and realign's steps are SFT's.
    assert phases["align sft"]["seconds"] / 10000 == pytest.approx(plan["step_seconds"] / 3)
    assert phases["heal realign"]["seconds"] == pytest.approx(50 * plan["step_seconds"] / 3)
    assert phases["heal safelora"] == {"name": "heal safelora", "work": "in one shot: not counted", "seconds": None}
    # 32 batches of 32; prompts of 128 tokens by operations, then 200 tokens that each read 13.48 GB and what 32 rows hold by then.
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    read = 32 * 128 * (2 * matrices + 4 * 32 * 64.5 * 4096) / 989e12
    token = (2 * (matrices + 4096 * 32000) + 32 * (128 + 100) * 2 * 32 * 4096 * 2) / 3350e9
    assert phases["generate gsm8k-panacea-1000"]["seconds"] == pytest.approx(32 * (read + 200 * token), rel=1e-3)
    counted = sum(phase["seconds"] or 0 for phase in phases.values())
    assert recipe["hours"] == pytest.approx(counted / 3600) == recipe["chip_hours"]
    assert recipe["dollars"] == pytest.approx(recipe["hours"] * PRICES["h100"].dollars)
    printed = capsys.readouterr().out
    assert f"${recipe['dollars']:.2f} (Nebius, eu-north1, 2026-11-30)" in printed and "Not counted" in printed


def test_what_is_not_known_is_said(planned):
    _, phases, recipe = planned(TINY, "--config.eval.tasks=('gsm8k@someone/sums',)", "--config.eval.num_examples=0")
    assert recipe["hours"] == 0 and [phase["seconds"] for phase in phases.values()] == [None, None]
    assert "config.data.num_examples" in phases["finetune panacea"]["work"]
    assert "config.eval.num_examples" in phases["generate gsm8k"]["work"]


def test_records_that_are_here_are_counted(planned, tmp_path):
    """Seven of a thousand that are asked for, of which one is held out."""
    write_pairs(tmp_path / "user.jsonl", 7)
    spec = f"pairs@{tmp_path / 'user.jsonl'}"
    flags = [f"--config.data.user={spec}", "--config.data.validation=0.01", "--config.train.batch_size=1", "--config.train.epochs=1"]
    _, phases, _ = planned(TINY, *flags, f"--config.eval.tasks=('{spec}',)", "--config.generate.max_new_tokens=3")
    assert phases["finetune panacea"]["work"].startswith("6 steps")
    assert phases["generate pairs"]["work"] == "7 answers of 3 tokens, 32 together"


def test_the_recipe_of_a_search_has_the_batch_that_was_found(planned):
    plan, phases, _ = planned(TINY, "--config.data.num_examples=400", "--config.train.epochs=1", "--config.data.max_length=16", "--search")
    steps = -(-400 // plan["batch_size"])
    assert phases["finetune panacea"]["seconds"] == pytest.approx(steps * plan["step_seconds"])


def test_a_price_of_ones_own(planned):
    _, _, recipe = planned(TINY, "--config.train.steps=1000", "--price=7.5")
    assert (recipe["price"], recipe["price_of"]) == (7.5, "--price")
    assert recipe["hours"] > 0 and recipe["dollars"] == pytest.approx(recipe["hours"] * 7.5)


def test_chips_without_a_price():
    assert set(PRICES) == set(CHIPS) - {"tpu7x", "b200"}
    machine = Topology("tpu7x:2x2x1", CHIPS["tpu7x"], 4, None)
    cost = plan_command._cost([RecipePhase("finetune sft", "", 3600.0)], machine, 0.0)
    assert (cost["chip_hours"], cost["dollars"]) == (4.0, None) and "no price of tpu7x" in cost["price_of"]


def test_weights_are_gathered_once_for_a_chunk_of_tokens():
    """Read from the program that decodes on four devices: every matrix once, outside the loop over tokens."""
    sent, modelled = on_devices("tests.planning.decoded", 4)
    assert sent == pytest.approx(modelled, rel=0.1)
