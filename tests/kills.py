"""SIGKILL at random instants of whole runs, comparisons and sweeps: align, fine-tune, heal, answer, judge, layers, convert, report.

    python -m tests.kills 200 [SEED]     # make kills; a line a case, exit code 1 if anything differs

Each case is a list of command lines, the first three of methods with a state of their own. They are run once undisturbed; then again and
again, killed at instants drawn over the time that this takes until they end, and from the beginning. Whatever ended must have left the
bytes of the undisturbed one: what was exported, answered and scored. A report tells times; it must be that of a call nobody killed.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What is compiled anew in every process would be most of what is killed.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from tests.records.killed import Commands
from tests.runs import Place, make_place

_ALIGN = ("--config.align.defence.name=sft", "--config.align.train.steps=3", "--config.align.train.batch_size=4")
_HEAL = ("--config.heal.defence.name=random_perturbation", "--config.heal.defence.rho=0.25")
_SHORT = ("--config.train.steps=2", "--config.eval.num_examples=3", "--config.data.num_examples=8")
# Command and flags by case.
CASES = {
    "panacea": ("run", *_ALIGN, *_HEAL, "--config.defence.name=panacea", "--config.defence.rho=0.5", "--config.defence.lam=0.3"),
    "lisa": (
        "run", *_ALIGN, *_HEAL,
        "--config.defence.name=lisa", "--config.defence.alignment_steps=2", "--config.defence.finetune_steps=2",
    ),
    "booster": ("run", *_ALIGN, *_HEAL, "--config.align.defence.name=booster", "--config.defence.name=sft"),
    "compare": ("compare", *_SHORT),
    "sweep": ("sweep", *_SHORT, "--over", "defence.rho=0.25,0.5"),
}  # fmt: skip
# What is left that does not depend on how long it took.
EXPORTS = (
    "**/adapter/*", "**/epsilon*.safetensors", "**/generations/*.jsonl", "**/judgements/*", "**/scores*.json", "layers.json", "layers.csv",
    "merged/*",
)  # fmt: skip


class Killed:
    """One case, undisturbed in ``whole/`` and killed in ``killed/N/``."""

    def __init__(self, commands: Commands, place: Place, root: Path, case: str) -> None:
        self._commands, self._place, self._root, self._case = commands, place, root / case, case
        whole = self._root / "whole" / "run"
        started = time.monotonic()
        for line in self._lines(whole):
            self._call(line)
        self._seconds = time.monotonic() - started
        self._wanted = _exports(whole)

    def _lines(self, workdir: Path) -> list[list[str]]:
        """The command lines; one whose folder is there and whole is left out, as it would be refused."""
        name, *flags = CASES[self._case]
        lines = [[name, *self._place.flags(*flags, "--config.checkpoint.every=1"), f"--workdir={workdir}"]]
        if name == "run" and not (workdir / "merged").exists():
            base = ("--config.model.path=" + str(self._place.base), f"--config.lora.init_from={workdir / 'heal' / 'adapter'}")
            lines.append(["convert", *base, f"--out={workdir / 'merged'}"])
        return [*lines, _report(workdir, "report")]

    def _call(self, line: list[str], after: float = 0) -> int:
        code = self._commands(line, after=after)
        assert code == 0 or (after and code == -9), f"{line[0]}: {code}\n{self._commands.log()[-3000:]}"
        return code

    def disturb(self, kills: int, draws: random.Random) -> tuple[Counter[str], int, set[str]]:
        """Kill so many times; how often which command was, how many times all came to their end, and what then differed, was lost or was
        too much."""
        met, ended, differ, since = Counter[str](), 0, set[str](), 0
        while met.total() < kills or since:
            workdir = self._root / "killed" / str(ended) / "run"
            killed, started = "", time.monotonic()
            left = draws.uniform(0.1, self._seconds) if met.total() < kills else 0.0
            for line in self._lines(workdir):
                after = max(0.05, left - (time.monotonic() - started)) if left else 0.0
                if self._call(line, after):
                    killed = line[0]
                    break
            if killed:
                met[killed] += 1
                since += 1
                continue
            if not since:  # the first call compiled, which none does after it
                self._seconds = time.monotonic() - started
            differ |= self._differing(workdir)
            shutil.rmtree(workdir)
            ended, since = ended + 1, 0
        return met, ended, differ

    def _differing(self, workdir: Path) -> set[str]:
        found = _exports(workdir)
        differ = {name for name in self._wanted.keys() | found.keys() if self._wanted.get(name) != found.get(name)}
        self._call(_report(workdir, "again"))
        reports = [{p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} for folder in
                   (workdir / "report", workdir / "again")]  # fmt: skip
        return differ | ({"report"} if reports[0] != reports[1] else set()) | {p.name for p in workdir.glob(".*.partial")}


def _report(workdir: Path, name: str) -> list[str]:
    return ["report", f"--workdir={workdir}", f"--out={workdir / name}"]


def _exports(workdir: Path) -> dict[str, bytes]:
    paths = {p for pattern in EXPORTS for p in workdir.glob(pattern) if p.is_file() and not p.name.startswith(".")}
    # A path in a configuration or a card is that of the run.
    return {str(p.relative_to(workdir)): p.read_bytes().replace(str(workdir).encode(), b"RUN") for p in paths}


def main(count: int, seed: int = 0) -> int:
    """So many kills over all cases; prints what came of them and returns the exit code."""
    draws, wrong = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(Path(folder) / "place")
        commands = Commands(Path(folder))
        for i, case in enumerate(CASES):
            kills = count // len(CASES) + (i < count % len(CASES))
            met, ended, differ = Killed(commands, place, Path(folder), case).disturb(kills, draws)
            said = ', '.join(sorted(differ)) or 'none'
            print(f"{case:<9}{met.total():>4} kills {dict(met)}, {ended} ends, differing: {said}", flush=True)
            wrong += len(differ)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
