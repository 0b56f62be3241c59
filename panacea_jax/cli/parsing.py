"""From the words of a command line to flags and a validated configuration."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from panacea_jax.cli.commands import COMMANDS
from panacea_jax.cli.flags import FLAGS, PROCESS_FLAGS
from panacea_jax.errors import InputError

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def parse_command(
    command: str, arguments: Sequence[str]
) -> "tuple[flags.FlagValues, ConfigDict]":
    """Flags and the validated configuration of a command.

    Raises:
        InputError: an unknown flag or key, a value of the wrong type, an unreadable recipe, an impossible value.
    """
    from ml_collections import config_flags

    from panacea_jax import config as config_module

    if wrong := next((argument for argument in arguments if "\0" in argument), None):
        raise InputError(f"{wrong:.200}: a null byte, which no path or value has")
    values = flags.FlagValues()
    for name in COMMANDS[command].flags:
        _define(values, name)
    if COMMANDS[command].several:
        flags.DEFINE_string("coordinator", "", PROCESS_FLAGS["coordinator"], flag_values=values)
        for name in ("num_processes", "process_id"):
            flags.DEFINE_integer(name, None, PROCESS_FLAGS[name], flag_values=values)
    if not COMMANDS[command].reads and (ours := next(filter(_CONFIG.match, arguments), None)):
        raise InputError(f"{ours.partition('=')[0]}: panacea {command} reads no configuration, so this would change nothing")
    recipe, arguments = _take_recipe(arguments)
    config = config_module.load_recipe(recipe) if recipe else config_module.get_config()
    for argument in arguments:
        if override := _OVERRIDE.match(argument):
            config_module.require_key(config, override[1])
    argv = [f"panacea {command}", *arguments]
    try:
        config_flags.DEFINE_config_dict("config", config, "recipe", values, sys_argv=argv)
        rest = values(argv)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    if "over" in values and values.over:  # --over A B: several behind one flag
        values["over"].value = [*values.over, *rest]
        rest = []
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; flags are --name=value")
    for name in ("over", "sampler", "trials"):  # in the place of a sweep's keys, before these are looked at
        if name in values and values[name].present:
            values.config.sweep[name] = tuple(values.over) if name == "over" else values[name].value
    config_module.validate(values.config)
    return values, values.config


# --config.a.b=1, --config.a.b 1, --noconfig.a.b and, for one entry of a list, --config.a.b[0]=1
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=\[]*)")
_CONFIG = re.compile(r"--?(?:no)?config(?:[.=]|$)")


def _take_recipe(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """What ``--config=`` names, and the other arguments."""
    rest, found = list(arguments), []
    for i in range(len(rest) - 1, -1, -1):
        name, equals, value = rest[i].partition("=")
        if name not in ("-config", "--config"):
            continue
        if not equals and i + 1 < len(rest):
            value = rest.pop(i + 1)
        found.append(value)
        del rest[i]
    if len(found) > 1 or "" in found:
        raise InputError(
            "--config is given twice"
            if len(found) > 1
            else "--config: name a recipe, FILE[:variant] or NAME[:variant]"
        )
    return (found[0] if found else ""), rest


def _define(values: flags.FlagValues, name: str) -> None:
    text, default = FLAGS[name]
    if isinstance(default, bool):
        flags.DEFINE_boolean(name, default, text, flag_values=values)
    elif isinstance(default, int):
        flags.DEFINE_integer(name, default, text, 0, flag_values=values)
    elif isinstance(default, list):
        flags.DEFINE_multi_string(name, default, text, flag_values=values)
    elif isinstance(default, float):
        flags.DEFINE_float(name, default, text, 0, flag_values=values)
    else:
        flags.DEFINE_string(name, default, text, flag_values=values)
