"""Everything that is needed to make the figures again: commands, configurations, seeds, versions and hashes."""

from panacea_jax.defences.protocol import STAGES
from panacea_jax.reporting.commands import GENERATIONS, command_of
from panacea_jax.reporting.outcomes import Found
from panacea_jax.reporting.parts import Section, Table
from panacea_jax.stores import by_address

COMMANDS = 40
"""Stages whose command is written out; a comparison's cells share most of it."""


def rerun_section(found: Found) -> Section:
    """Commands first, then what they have to meet: hashes of the inputs, versions, devices."""
    # Cells of a comparison share stages.
    stages = {run.stages[name].resolve(): (run, name, made) for run in found.runs for name, made in run.manifests().items()}
    asked = [stage for stage in stages.values() if stage[1] in (*STAGES, GENERATIONS)]  # others, as a merged base, are made on the way
    several = asked[:COMMANDS]
    commands = [*found.commands, *(command_of(name, made["config"], by_address(run.stages[name].parent)) for run, name, made in several)]
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
    if len(asked) > COMMANDS:
        text.append(f"Of {len(asked)} stages the first {COMMANDS} are written out as commands; each one's manifest.json holds the rest.")
    return Section("To make it again", text, (), [t for t in tables if t.rows], commands)
