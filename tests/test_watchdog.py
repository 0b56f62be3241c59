"""A run that does not move says what it is at, once, and goes on or ends."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from panacea_jax import watchdog
from panacea_jax.progress import Progress
from tests.runs import make_place, panacea

ROOT = Path(__file__).parents[1]


def stalled_here(seconds):
    time.sleep(seconds)


def test_the_stacks_are_told_once_and_the_run_goes_on(tmp_path, capfd):
    with watchdog.watched(0.2, tmp_path), Progress("train", 9) as bar:
        stalled_here(0.6)
        bar.advance()
        stalled_here(0.6)
    said = capfd.readouterr().err
    [file] = tmp_path.iterdir()
    assert "in stalled_here" in file.read_text() and said.count("in stalled_here") == 1
    line = said.splitlines()[-1]
    assert line.startswith("panacea: nothing ended for 0.2 s (config.watch.stall); the run goes on.") and str(file) in line


@pytest.mark.parametrize("seconds", [0.0, 0.4])
def test_what_moves_or_is_not_to_move_is_left_alone(tmp_path, capfd, seconds):
    """Steps that take half of the bound; loading, before and after, which takes twice as long as it."""
    with watchdog.watched(seconds, tmp_path):
        stalled_here(0.8)
        with Progress("train", 9) as bar:
            for _ in range(6):
                stalled_here(0.2)
                bar.advance()
        stalled_here(0.8)
    assert capfd.readouterr().err == "" and not list(tmp_path.iterdir())


def test_batches_within_a_step_of_the_bar_count(tmp_path, capfd):
    with watchdog.watched(0.4, tmp_path), Progress("generate", 9):
        for _ in range(6):
            stalled_here(0.2)
            watchdog.alive()
    assert capfd.readouterr().err == ""


ENDED = """
import sys, time
from pathlib import Path
from panacea_jax import watchdog
from panacea_jax.progress import Progress
with watchdog.watched(0.2, Path(sys.argv[1]) / "gone", stop=True), Progress("train", 9):
    time.sleep(60)
"""


def test_a_run_may_be_ended(tmp_path):
    done = subprocess.run([sys.executable, "-c", ENDED, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=50)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "the run ends; the same command goes on from the last checkpoint" in line and line.endswith("stand above")


def test_training_is_watched(tmp_path, monkeypatch, capfd):
    """From the command line, by its key; what comes out is the same."""
    from panacea_jax.train.metrics import MetricsWriter

    place, adapters = make_place(tmp_path / "place"), []
    real = MetricsWriter.write

    def slow(self, step, scalars):
        time.sleep(1.5 * (step == 2))
        real(self, step, scalars)

    for stall, name in ((0.0, "a"), (1.0, "b")):
        monkeypatch.setattr(MetricsWriter, "write", slow)
        flags = place.flags("--config.defence.name=sft", f"--config.watch.stall={stall}", f"--workdir={tmp_path / name}")
        assert panacea("finetune", *flags) == 0
        adapters.append((tmp_path / name / "finetune" / "adapter" / "adapter_model.safetensors").read_bytes())
        found = list((tmp_path / name).glob("stacks.*.txt"))
        assert len(found) == (stall > 0) == ("nothing ended for 1 s" in capfd.readouterr().err)
    assert "in slow" in found[0].read_text() and adapters[0] == adapters[1]
