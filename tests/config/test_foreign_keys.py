"""A hyper-parameter that the named method does not have is refused by its key, wherever it is set."""

import pytest

from panacea_jax.config import get_config, stage_config, validate
from panacea_jax.config.methods import (
    NumberOrWord,
    all_hyper_parameters,
    make_defence,
    method_defaults,
)
from panacea_jax.defences import DEFENCES
from panacea_jax.errors import InputError
from tests.runs import panacea

# A value of the right type for a key, whatever it means.
VALUES = {float: 0.5, int: 3, bool: True, str: "mean", tuple: (0.5,), NumberOrWord: 0.5}
KEYS = all_hyper_parameters()
FOREIGN = [(name, key) for name in DEFENCES for key in KEYS if key not in method_defaults(name)]


@pytest.mark.parametrize("name", DEFENCES)
@pytest.mark.parametrize("prefix", ["", "align.", "heal."])
def test_every_key_that_a_method_lacks(name, prefix):
    """In the section of any stage; the message says what the method has."""
    keys = [key for method, key in FOREIGN if method == name]
    assert keys
    section = get_config().defence
    section.name = name
    for key in keys:
        before, section[key] = section[key], VALUES[KEYS[key]]
        with pytest.raises(InputError) as error:
            make_defence(section, prefix)
        section[key] = before
        said = str(error.value)
        assert said.startswith(f"config.{prefix}defence.{key} = ") and f"{name} has no {key}" in said
        assert all(own in said for own in method_defaults(name))


@pytest.mark.parametrize("name", DEFENCES)
@pytest.mark.parametrize("prefix", ["", "align.", "heal."])
def test_validation_finds_them(name, prefix):
    key = next(key for method, key in FOREIGN if method == name)
    config = get_config()
    section = config if not prefix else config[prefix[:-1]]
    section.defence.name = name
    section.defence[key] = VALUES[KEYS[key]]
    with pytest.raises(InputError, match=rf"config\.{prefix}defence\.{key} = .*{name} has no {key}"):
        validate(config)


@pytest.mark.parametrize("name", DEFENCES)
def test_its_own_keys_are_taken(name):
    config = get_config()
    config.defence.name = name
    for key, default in method_defaults(name).items():
        if default is not None:
            config.defence[key] = default
    validate(config)
    assert make_defence(config.defence) == DEFENCES[name]()
    assert make_defence(stage_config(config, "finetune").defence) == DEFENCES[name]()


def test_a_key_of_a_stage_that_is_left_out():
    config = get_config()
    config.heal.defence.rho = 0.5
    with pytest.raises(InputError, match=r"config\.heal\.defence\.rho = 0\.5: config\.heal\.defence\.name is not set"):
        validate(config)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config.defence.name=sft", "--config.defence.lam=0.1"], "config.defence.lam = 0.1: sft has no lam; it has none"),
        (["--config.defence.sigma=0.1"], "config.defence.sigma = 0.1: panacea has no sigma; it has rho, lam"),
        (["--config.align.defence.name=vaccine", "--config.align.defence.lam=1"], "config.align.defence.lam = 1.0: vaccine has no lam"),
    ],
)
def test_on_the_command_line(arguments, named, capsys, tmp_path):
    assert panacea("run", *arguments, f"--workdir={tmp_path / 'out'}") == 2
    assert named in capsys.readouterr().err


def test_in_a_recipe(tmp_path, capsys):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from panacea_jax.config import get_config as default\n"
        "def get_config():\n    config = default()\n    config.defence.name = 'ewc'\n    config.defence.rho = 1.0\n    return config\n"
    )
    assert panacea("finetune", f"--config={recipe}", f"--workdir={tmp_path / 'out'}") == 2
    assert "config.defence.rho = 1.0: ewc has no rho; it has lam" in capsys.readouterr().err


def test_from_python():
    with pytest.raises(TypeError, match="sigma"):
        DEFENCES["panacea"](sigma=1.0)
