"""Damage to a finished work directory: random bits flipped, files cut, and what becomes of each.

    python -m tests.faults 1000 [SEED]     # make faults; a table of counts, exit code 1 if any was missed

Every fault is *found* (``panacea verify`` names it; of a newest checkpoint: it is named and the one before is restored), *harmless* (what
is read is bit for bit what was written) or *missed*. The file is drawn first, each as likely, then the bit or the place of the cut.
"""

import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from panacea_jax.stages.trust import DIFFERS, HOLDS, check_workdir
from panacea_jax.train.checkpoints import Checkpoints, flatten, newest_checkpoint, read_checkpoint
from panacea_jax.train.step import TrainState
from panacea_jax.workdir import read_manifest, run_id
from tests import runs

FOUND, HARMLESS, MISSED = "found", "harmless", "missed"
# Reports, which nothing is made from, and what people and trackers go on writing to.
REPORTS = ("README.md", "events.out.tfevents.*", "summary.json", "layers.*")


class Faults:
    """Faults in a copy of a finished work directory, which is put right after each."""

    def __init__(self, finished: Path, place: Path, seed: int) -> None:
        self._random, self._place = random.Random(seed), place
        # Without checkpoints a look at all the rest takes milliseconds; they have a copy of their own.
        self._rest = place / "rest"
        shutil.copytree(finished, self._rest, ignore=shutil.ignore_patterns("checkpoints"))
        self._sound = {check.what: check.outcome for check in check_workdir(self._rest)}
        assert DIFFERS not in self._sound.values()
        self._stage = finished / "finetune"
        self._kept = {int(p.name): read_checkpoint(p)[0] for p in (self._stage / "checkpoints").iterdir()}
        newest = newest_checkpoint(self._stage)
        assert newest is not None and len(self._kept) > 1
        self._newest, self._checkpoint = max(self._kept), newest
        self._parts = [p for p in sorted(newest.rglob("*")) if p.is_file()]
        self._files = [
            p for p in sorted(self._rest.rglob("*"))
            if p.is_file() and p.stat().st_size and not p.name.startswith(".") and not any(p.match(report) for report in REPORTS)
        ]  # fmt: skip

    def draw(self, checkpoint: bool) -> tuple[str, str, str]:
        """Do one, and say of what kind the file is, what was done, and what became of it."""
        return self._in_checkpoint() if checkpoint else self._in_the_rest()

    def _damaged(self, data: bytes) -> tuple[bytes, str]:
        if self._random.random() < 0.25 and data:
            return data[: self._random.randrange(len(data))], "cut"
        changed, bit = bytearray(data), self._random.randrange(8 * max(1, len(data)))
        if not changed:
            return b"\0", "grown"
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed), "bit"

    def _in_the_rest(self) -> tuple[str, str, str]:
        path = self._random.choice(self._files)
        whole = path.read_bytes()
        changed, how = self._damaged(whole)
        path.write_bytes(changed)
        try:
            found = self._noticed()
        finally:
            path.write_bytes(whole)
        if found:
            return _kind(path), how, FOUND
        return _kind(path), how, HARMLESS if _same_json(whole, changed) else f"{MISSED}: {path.relative_to(self._rest)}"

    def _noticed(self) -> bool:
        """Whether anything differs, or what was known is no longer."""
        found = {check.what: check.outcome for check in check_workdir(self._rest)}
        return any(outcome == DIFFERS or (outcome != HOLDS and self._sound.get(what) == HOLDS) for what, outcome in found.items())

    def _in_checkpoint(self) -> tuple[str, str, str]:
        folder = self._place / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._checkpoint.parent, folder)
        part = self._random.choice(self._parts)
        path = folder / part.relative_to(self._checkpoint.parent)
        changed, how = self._damaged(path.read_bytes())
        path.write_bytes(changed)
        checkpoints = Checkpoints(folder, run=run_id(read_manifest(self._stage)))
        # A checkpoint is restored into whatever has the names of its arrays.
        tree = unflatten_dict({name: jnp.zeros(x.shape, x.dtype) for name, x in self._kept[self._newest].items()}, sep=".")
        state, _ = checkpoints.restore(TrainState(tree["params"], tree["opt_state"], tree["defence"], tree["step"]))
        checkpoints.close()
        arrays = flatten(state)
        aside = (folder / f"{self._newest}.damaged").is_dir()
        step = sorted(self._kept)[-2 if aside else -1]
        same = all(np.asarray(arrays[name]).tobytes() == x.tobytes() for name, x in self._kept[step].items())
        outcome = (FOUND if aside else HARMLESS) if same else f"{MISSED}: {part.relative_to(self._checkpoint)}"
        return "checkpoint", how, outcome


def _kind(path: Path) -> str:
    if path.name == "manifest.json":
        return "manifest"
    if path.suffix == ".jsonl":
        return "journal"
    return "export" if {"adapter", "model"} & set(path.parts[-2:]) or path.suffix == ".safetensors" else "other"


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


class _Folders:
    """What pytest's tmp_path_factory gives."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def mktemp(self, name: str) -> Path:
        (self._root / name).mkdir()
        return self._root / name


def main(count: int, seed: int = 0) -> int:
    """So many faults, half of them in a checkpoint; prints the counts and returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        _, finished = runs.finished_run(_Folders(Path(folder)))  # type: ignore[arg-type]
        faults = Faults(finished, Path(folder) / "faults", seed)
        drawn = Counter(faults.draw(checkpoint=i % 2 == 0) for i in range(count))
    for (kind, how, outcome), n in sorted(drawn.items()):
        print(f"{kind:<12}{how:<8}{outcome:<40}{n:>6}")
    missed = sum(n for (_, _, outcome), n in drawn.items() if outcome not in (FOUND, HARMLESS))
    print(f"{count} faults, {missed} missed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
