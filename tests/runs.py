"""Command lines on the tiny model, run in this process, and two finished runs that several tests look at."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import absl.logging
import pytest

from panacea_jax import cli
from panacea_jax.sums import sha256_json
from panacea_jax.workdir import write_json
from tests.reads import only_what_help_names
from tests.tiny import write_model, write_pairs

RHO = 0.5
STEPS = 4
ADAPTED = ("q", "v", "down")


_made: dict[str, Path] = {}


class Place(NamedTuple):
    """A base model and the sources that fit it."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    def spec(self, name: str) -> str:
        task = {"goals": "advbench", "safe": "xstest"}.get(name, "pairs")
        return f"{task}@{self.root / name}.jsonl"

    def flags(self, *more: str) -> list[str]:
        """Flags of every command here; those in ``more`` win."""
        flags = {
            "model.path": self.base, "model.dtype": "float32", "lora.rank": 2, "lora.alpha": 4, "lora.targets": ADAPTED,
            "data.user": self.spec("user"), "data.attack": self.spec("attack"), "data.harmful": self.spec("harmful"),
            "data.alignment": self.spec("alignment"), "data.num_examples": 12, "data.poison_ratio": 0.25,
            "data.num_harmful": 0, "data.num_alignment": 0, "data.max_length": 32, "data.template": "chat",
            "train.batch_size": 4, "train.harmful_batch_size": 4, "train.steps": STEPS, "train.log_every": 1,
            "optimizer.learning_rate": 1e-2,
            "checkpoint.every": 3, "checkpoint.keep": 2, "generate.batch_size": 4, "generate.max_new_tokens": 4,
            "eval.tasks": tuple(self.spec(s) for s in ("goals", "test", "safe")), "eval.num_examples": 0,
        }  # fmt: skip
        if not any(flag.startswith("--config.defence.name=") for flag in more):
            flags |= {"defence.rho": RHO, "defence.lam": 0.3}  # Panacea, the default
        changed = {flag.partition("=")[0] for flag in more}
        ours = [f"--config.{k}={v}" for k, v in flags.items() if f"--config.{k}" not in changed]
        return [*ours, *more]


def make_place(root: Path) -> Place:
    """Write the base and its sources."""
    if "base" in _made:  # compiled and drawn once
        shutil.copytree(_made["base"], root / "base")
    else:
        _made["base"] = write_model(root / "base")
    for seed, (name, rows) in enumerate(
        {"user": 12, "attack": 6, "harmful": 7, "alignment": 8, "test": 6}.items()
    ):
        write_pairs(root / f"{name}.jsonl", rows, seed)
    for name, key, extra in (
        ("goals", "goal", {}),
        ("safe", "prompt", {"label": "safe", "type": "homonyms"}),
    ):
        lines = [json.dumps({key: f"w{i} w{i + 1} w{i + 2}", **extra}) + "\n" for i in range(5)]
        (root / f"{name}.jsonl").write_text("".join(lines))
    return Place(root)


def panacea(*arguments: object) -> int:
    """One command line; the logging that it sets up for its process is taken back. It may read what its ``--help`` names, no more."""
    words = [str(a) for a in arguments]
    with _logging_as_it_was(), only_what_help_names(words[0] if words else ""):
        return cli.run(words)


@contextlib.contextmanager
def _logging_as_it_was() -> Iterator[None]:
    root, verbosity = logging.getLogger(), absl.logging.get_verbosity()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        absl.logging.set_verbosity(verbosity)
        root.handlers[:] = handlers
        root.setLevel(level)


def rewrite_manifest(stage: Path, **changes: object) -> None:
    """Change what the manifest of a stage says, as if it had been written so."""
    path = stage / "manifest.json"
    manifest = {k: v for k, v in json.loads(path.read_text("utf-8")).items() if k != "sha256"} | changes
    write_json(path, manifest | {"sha256": sha256_json(manifest)})


def _once(name: str, tmp_path_factory: pytest.TempPathFactory, *more: str) -> tuple[Place, Path]:
    if name not in _made:
        root = tmp_path_factory.mktemp(name)
        place = make_place(root / "place")
        assert panacea("run", *place.flags(*more), f"--workdir={root / 'run'}") == 0
        _made[name] = root
    return Place(_made[name] / "place"), _made[name] / "run"


def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Path]:
    """align (SFT) → finetune (Panacea) → heal (noise) → generate → judge → layers on adapters; made once a session, to be read only."""
    return _once(
        "lora", tmp_path_factory,
        "--config.align.defence.name=sft", "--config.align.train.steps=3", "--config.align.train.batch_size=4",
        "--config.heal.defence.name=random_perturbation", "--config.heal.defence.rho=0.25",
    )  # fmt: skip


def finished_full_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Path]:
    """finetune (Panacea) → layers with all parameters; made once a session, to be read only."""
    return _once(
        "full", tmp_path_factory,
        "--config.train.full_parameters=True", "--config.eval.tasks=()", "--config.optimizer.learning_rate=1e-3",
    )  # fmt: skip
