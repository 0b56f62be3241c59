"""From what a manifest says was made to the command line that makes it."""

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections.config_flags import config_path

from panacea_jax.config import get_config
from panacea_jax.config.defaults import keys
from panacea_jax.evaluate.scores import Json

GENERATIONS = "generations"
_NAME = "defence.name"


def command_of(made: str, config: Json, workdir: str) -> str:
    """The command line that asks for what was made with a configuration.

    Args:
        made: align, finetune, heal or generations, or a command.
        config: all of it or, of a stage, the part that its manifest holds.
        workdir: for the results.
    """
    config = _of_answers(config) if made == GENERATIONS else config
    command = "generate" if made == GENERATIONS else made
    flags = [f"--config.{key}={_written(value)}" for key, value in _changed(config)]
    return shlex.join(["panacea", command, *flags, f"--workdir={workdir}"])


def _of_answers(config: Json) -> Json:
    """The keys of a configuration, from what the manifest of answers holds: what it says beside these is of the prompts."""
    own = ("model", "adapter", "eval", "decoding")
    return {
        "model": config["model"],
        "eval": config["eval"],
        "data": {key: value for key, value in config.items() if key not in own},
        "generate": {"adapter": config["adapter"] or "", **config.get("decoding", {})},
    }


def _changed(config: Json) -> Iterator[tuple[str, Any]]:
    """Keys whose value is not the default; methods before their hyper-parameters, whose defaults are the method's own."""
    flat = dict(_flat(config))
    unnamed, named = get_config(), get_config()
    with named.unlocked():
        for key in (key for key, value in flat.items() if key.endswith(_NAME) and value):
            config_path.set_value(key, named, flat[key])
    known = {key: config_path.get_value(key, unnamed if key.endswith(_NAME) else named) for key in keys(named)}
    for key in sorted(flat, key=lambda key: (key != "model.path", key.partition(".")[0], not key.endswith(_NAME))):
        if key in known and flat[key] is not None and _plain(known[key]) != _plain(flat[key]):
            yield key, flat[key]


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _written(value: Any) -> str:
    """A value as the command line reads it: lists are tuples."""
    return repr(tuple(value)) if isinstance(value, list) else str(value)
