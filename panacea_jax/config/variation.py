"""Settings that a comparison varies, written ``KEY=VALUE|VALUE``: an attacker's learning rate, the number of the defender's records."""

import ast
import itertools
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from panacea_jax.config.defaults import keys
from panacea_jax.errors import InputError

Setting = tuple[tuple[str, Any], ...]
"""Keys and their values, in the order in which they are listed."""

_KEY = "config.compare.vary"
# What may vary in a comparison: not what defends, not how it is measured, and not what other axes are there for.
SECTIONS = ("data", "lora", "optimizer", "train", "attack", "heal.optimizer", "heal.train", "after")
WORLD = "compare.world"
"""Varies too, where seeds are worlds: the same worlds with bases of other architectures."""
_OTHER_AXES = {"data.poison_ratio": "config.compare.ratios says these"}


def variations(entries: Sequence[str], config: ConfigDict) -> list[Setting]:
    """Every combination of the alternatives; without entries the one empty setting.

    Args:
        entries: such as ``("optimizer.learning_rate=1e-4|5e-4", "train.epochs=1|5")``; the last one varies fastest.
        config: whose keys they are.

    Raises:
        InputError: an entry of another form, a key that is none or may not vary, or a value of the wrong type or that is there twice.
    """
    known = {key for key in keys(config) if key.startswith(tuple(f"{s}." for s in SECTIONS))}
    if config.compare.world:
        known.add(WORLD)
    alternatives: dict[str, list[Any]] = {}
    for entry in map(str, entries):
        key, equals, written = (part.strip() for part in entry.partition("="))
        if not equals or not written:
            raise InputError(f"{_KEY}: {entry!r} is not KEY=VALUE|VALUE")
        if key in _OTHER_AXES:
            raise InputError(f"{_KEY}: {entry!r}: {_OTHER_AXES[key]}")
        if key not in known:
            raise InputError(f"{_KEY}: {entry!r}: no key of {', '.join(SECTIONS)}")
        if key in alternatives:
            raise InputError(f"{_KEY}: {key} is there twice")
        alternatives[key] = [read_value(text.strip(), key, config, _KEY) for text in written.split("|")]
        if len(set(map(repr, alternatives[key]))) < len(alternatives[key]):
            raise InputError(f"{_KEY}: {entry!r}: a value is there twice")
    return [tuple(zip(alternatives, values)) for values in itertools.product(*alternatives.values())]


def read_value(text: str, key: str, config: ConfigDict, source: str) -> Any:
    """What a key holds once the text is assigned to it.

    Args:
        text: as on the command line.
        key: dotted.
        config: whose key it is.
        source: the key that the text stands in, for messages.

    Raises:
        InputError: a value of the wrong type.
    """
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    try:
        return config_path.get_value(key, varied(config, ((key, value),)))
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: {key}={text}: {error}") from error


def varied(config: ConfigDict, setting: Setting) -> ConfigDict:
    """A copy with the setting's values."""
    config = config.copy_and_resolve_references()
    for key, value in setting:
        config_path.set_value(key, config, value)
    return config


def written(setting: Setting) -> str:
    """A setting in a line, as names of folders and tables have it."""
    return ",".join(f"{key}={value}" for key, value in setting)
