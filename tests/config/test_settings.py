"""Keys that take a number, a word or several numbers."""

import pytest

from panacea_jax.cli.parsing import parse_command
from panacea_jax.config import get_config, validate
from panacea_jax.config.methods import make_defence
from panacea_jax.stages.lineage import named
from panacea_jax.stages.train import decisive
from tests.runs import panacea


def written(*arguments):
    """The configuration that a command line makes."""
    return parse_command("doctor", [f"--config.{argument}" for argument in arguments])[1]


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.25", 0.25), ("1", 1.0), ("auto", "auto"), ("(1,2)", (1.0, 2.0)), ("[0.5, 1e-3]", (0.5, 1e-3))],
)
def test_what_is_written_is_what_the_method_gets(text, value):
    config = written(f"defence.rho={text}")
    assert config.defence.rho == value and type(config.defence.rho) is type(value)
    validate(config)
    assert make_defence(config.defence).rho == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("uniform", "uniform"), ("top:2", "top:2"), ("(1,0)", (1.0, 0.0)), ("runs/a/layers.json", "runs/a/layers.json")],
)
def test_a_rule_for_the_layers(text, value):
    config = written(f"defence.rho_per_layer={text}")
    assert make_defence(config.defence).rho_per_layer == value


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["defence.name=vaccine", "defence.rho=auto"], "config.defence.rho = 'auto': vaccine takes a number here"),
        (["defence.name=vaccine", "defence.rho=(1,2)"], "config.defence.rho = (1.0, 2.0): vaccine takes a number here"),
        (["defence.rho=large"], "config.defence.rho = large: a radius is a finite number, 0 or more, or auto"),
        (["defence.rho=(1,-2)"], "config.defence.rho = (1.0, -2.0): a radius is"),
        (["defence.rho_per_layer=0.5"], "config.defence.rho_per_layer = 0.5: panacea takes a word or several numbers here"),
        (["defence.start=1"], "config.defence.start = 1.0: a share of the steps, 0 or more, below 1"),
        (["defence.between=never"], "config.defence.between = 'never': one of reuse, skip"),
        (["defence.off=('task',)"], "config.defence.off = ('task',): 'user' or 'benign' or 'alignment'"),
        (["defence.trusted=('harmful',)"], "config.defence.trusted = ('harmful',): 'benign' or 'alignment'"),
        (["defence.tau=-1"], "config.defence.tau = -1.0: a finite number, 0 or more"),
        (["defence.off=('user',)", "defence.final_epsilon=mean"], "config.defence.off: 'user' does not go with final_epsilon = mean"),
    ],
)
def test_one_line_for_what_is_no_setting(settings, said, capsys, tmp_path):
    flags = [f"--config.{setting}" for setting in settings]
    assert panacea("finetune", *flags, f"--workdir={tmp_path / 'out'}") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_whole_number_is_the_same_number():
    """In what a work directory's manifest is compared by, from the command line and from a recipe."""
    recipe = get_config()
    recipe.defence.rho = 1
    ones = [written("defence.rho=1"), written("defence.rho=1.0"), recipe, get_config()]
    found = [decisive(config, named(config)) for config in ones]
    assert all(x == found[0] for x in found)
    assert found[0]["defence"]["rho"] == 1.0 and type(found[0]["defence"]["rho"]) is float


def test_work_directories_from_before_go_on():
    """Keys at which a stage does what it did before they were there are no part of its manifest."""
    config = get_config()
    kept = decisive(config, named(config))["defence"]
    assert {"tau", "rho_per_layer", "start", "between", "trusted", "trust", "off", "by_poison"}.isdisjoint(kept)
    config.defence.tau = 0.5
    assert decisive(config, named(config))["defence"]["tau"] == 0.5
