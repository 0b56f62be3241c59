"""Whether what finished stages read is still what it was: records and base models may change under their names."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from panacea_jax.data.sources import fingerprint
from panacea_jax.errors import InputError
from panacea_jax.parallel import processes
from panacea_jax.stages import lineage
from panacea_jax.stages.lineage import Start
from panacea_jax.workdir import manifest_if_any

_SETS = ("user", "attack", "harmful", "alignment", "benign")


class Unchanged:
    """Holds finished stages against the records and the base that a configuration names, each of which is read once."""

    def __init__(self) -> None:
        self._sources: dict[str, str] = {}
        self._models: dict[Start, Mapping[str, str]] = {}

    def check(self, config: ConfigDict, stages: Iterable[Path]) -> None:
        """Make sure that finished stages are of what is there now.

        Args:
            config: that they were made by.
            stages: their folders. Inputs that the configuration does not name, such as what another stage left, are passed over.

        Raises:
            InputError: one was made from other content of the same name.
        """
        for stage in stages:
            inputs = manifest_if_any(stage).get("inputs", {})
            if inputs and (change := processes.first_change(inputs, inputs | self._now(config, inputs))):
                raise InputError(f"{stage}: made by another run (input {change}); choose another --workdir")

    def _now(self, config: ConfigDict, names: Collection[str]) -> dict[str, str]:
        """Fingerprints as they are now, of those names that the configuration has."""
        keys = {config.data[name]: f"config.data.{name}" for name in _SETS} | dict.fromkeys(config.eval.tasks, "config.eval.tasks")
        for spec in names:
            if spec in keys and spec not in self._sources:
                self._sources[spec] = fingerprint(spec, keys[spec])
        start = lineage.named(config)
        if start not in self._models:
            self._models[start] = start.inputs()
        known = {**self._models[start], **{spec: digest for spec, digest in self._sources.items() if spec in keys}}
        return {name: known[name] for name in names if name in known}
