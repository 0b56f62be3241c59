"""Everything that is needed to make the figures again: commands, configurations, seeds, versions and hashes."""

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections.config_flags import config_path

from panacea_jax.config import get_config
from panacea_jax.config.defaults import keys
from panacea_jax.evaluate.scores import Json
from panacea_jax.reporting.outcomes import Found
from panacea_jax.reporting.parts import Section, Table

GENERATIONS = "generations"
COMMANDS = 40
"""Stages whose command is written out; a comparison's cells share most of it."""


def rerun_section(found: Found) -> Section:
    """Commands first, then what they have to meet: hashes of the inputs, versions, devices."""
    # Cells of a comparison share stages.
    stages = {run.stages[name].resolve(): (run, name, made) for run in found.runs for name, made in run.manifests().items()}
    commands = [command_of(name, manifest, str(run.stages[name].parent)) for run, name, manifest in list(stages.values())[:COMMANDS]]
    rows = [
        [run.name, name, *(str(m.get(key, "–")) for key in ("date", "config_sha256")), ", ".join(m.get("devices", []))]
        for run, name, m in stages.values()
    ]  # fmt: skip
    inputs = dict.fromkeys((source, digest) for _, _, m in stages.values() for source, digest in m["inputs"].items())
    versions = dict.fromkeys((package, version) for _, _, m in stages.values() for package, version in m.get("versions", {}).items())
    tables = [
        Table(["run", "stage", "date", "configuration, sha256", "devices"], rows, "Stages", folded=True),
        Table(["input", "sha256"], list(map(list, inputs)), "Inputs", folded=True),
        Table(["package", "version"], list(map(list, versions)), "Versions", folded=True),
    ]
    text = [
        "Paths are as they were where the runs were started. Keys that a command leaves out have their defaults; those that change no "
        "number are left out."
    ]
    if len(stages) > COMMANDS:
        text.append(f"Of {len(stages)} stages the first {COMMANDS} are written out as commands; each one's manifest.json holds the rest.")
    return Section("To make it again", text, (), [t for t in tables if t.rows], commands)


def command_of(stage: str, manifest: Json, workdir: str) -> str:
    """The command line that asks for what a stage's manifest says was made.

    Args:
        stage: align, finetune, heal or generations.
        manifest: its manifest.
        workdir: for the results.
    """
    config = _of_answers(manifest["config"]) if stage == GENERATIONS else manifest["config"]
    command = "generate" if stage == GENERATIONS else stage
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
    """Keys whose value is not the default; a method's hyper-parameters stand behind its name."""
    default = get_config()
    known = set(keys(default))
    flat = dict(_flat(config))
    if name := flat.get("defence.name"):
        with default.unlocked():
            default.defence.name = name
    for key in sorted(flat, key=lambda key: (key != "model.path", key.partition(".")[0], not key.endswith(".name"))):
        value = flat[key]
        if key in known and value is not None and _plain(config_path.get_value(key, default)) != _plain(value):
            yield key, value


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
