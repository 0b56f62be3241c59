"""SIGKILL at random instants of a whole run, and of what comes after it: align, fine-tune, heal, answer, judge, layers, convert, report.

    python -m tests.kills 200 [SEED]     # make kills; a line a method, exit code 1 if anything differs

Each method, all with a state of their own, is killed so many times, at instants drawn over the time that a run takes which nobody disturbs;
then it is let end. What was exported, answered and scored must have the bytes of that run.
"""

import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.records.killed import Commands
from tests.runs import Place, make_place

METHODS = {
    "panacea": ("--config.defence.name=panacea", "--config.defence.rho=0.5", "--config.defence.lam=0.3"),
    "lisa": ("--config.defence.name=lisa", "--config.defence.alignment_steps=2", "--config.defence.finetune_steps=2"),
    "booster": ("--config.align.defence.name=booster", "--config.defence.name=sft"),
}
# What a run leaves that does not depend on how long it took.
EXPORTS = (
    "*/adapter/*", "*/epsilon*.safetensors", "generations/*.jsonl", "judgements/*", "scores*.json", "layers.json", "layers.csv", "merged/*",
)  # fmt: skip


class Killed:
    """One method's command lines, undisturbed in ``whole/`` and killed in ``killed/``."""

    def __init__(self, commands: Commands, place: Place, root: Path, method: str) -> None:
        self._commands, self._place, self._root, self._method = commands, place, root / method, method
        started = time.monotonic()
        self._end(self._root / "whole" / "run")
        self._seconds = time.monotonic() - started

    def _lines(self, workdir: Path) -> list[list[str]]:
        align = () if self._method == "booster" else ("--config.align.defence.name=sft",)
        run = self._place.flags(
            *METHODS[self._method], *align, "--config.align.train.steps=3", "--config.align.train.batch_size=4",
            "--config.checkpoint.every=1", "--config.heal.defence.name=random_perturbation", "--config.heal.defence.rho=0.25",
            f"--workdir={workdir}",
        )  # fmt: skip
        merged = [
            f"--config.model.path={self._place.base}", f"--config.lora.init_from={workdir / 'heal' / 'adapter'}",
            f"--out={workdir / 'merged'}",
        ]  # fmt: skip
        return [["run", *run], *([] if (workdir / "merged").exists() else [["convert", *merged]])]

    def _end(self, workdir: Path) -> None:
        for line in self._lines(workdir):
            code = self._commands(line)
            assert code == 0, f"{line[0]}: {code}\n{self._commands.log()[-3000:]}"

    def disturb(self, kills: int, draws: random.Random) -> tuple[int, list[str]]:
        """Kill so many times, let it end; how many kills met a command at work, and the exports that differ, are lost or are too many."""
        workdir, met = self._root / "killed" / "run", 0
        for _ in range(kills):
            # Starting takes most of a short run: half of the instants are drawn over its first part, half over all of it.
            left = draws.uniform(0.1, self._seconds * draws.choice((0.5, 1.0)))
            for line in self._lines(workdir):
                began = time.monotonic()
                code = self._commands(line, after=max(0.05, left))
                left -= time.monotonic() - began
                assert code in (0, -9), f"{line[0]}: {code}\n{self._commands.log()[-3000:]}"
                if code == -9:
                    met += 1
                    break
        self._end(workdir)
        wanted, found = (_exports(self._root / name / "run") for name in ("whole", "killed"))
        return met, sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def _exports(workdir: Path) -> dict[str, bytes]:
    paths = {p for pattern in EXPORTS for p in workdir.glob(pattern) if p.is_file() and not p.name.startswith(".")}
    # A path in a configuration or a card is that of the run.
    return {str(p.relative_to(workdir)): p.read_bytes().replace(str(workdir).encode(), b"RUN") for p in paths}


def main(count: int, seed: int = 0) -> int:
    """So many kills over all methods; prints what came of them and returns the exit code."""
    draws, wrong = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(Path(folder) / "place")
        commands = Commands(Path(folder))
        for i, method in enumerate(METHODS):
            kills = count // len(METHODS) + (i < count % len(METHODS))
            met, differ = Killed(commands, place, Path(folder), method).disturb(kills, draws)
            print(f"{method:<10}{kills:>5} kills, {met} of a command at work; differing: {', '.join(differ) or 'none'}", flush=True)
            wrong += len(differ)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
