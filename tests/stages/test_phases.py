"""How long a run took and what it warned of, when it is stopped in different ways."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from panacea_jax.errors import InputError
from panacea_jax.stages import phases as phases_module
from panacea_jax.stages.phases import Phases
from panacea_jax.train.signals import Preempted


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are told to."""

    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(phases_module, "time", clock)
    return clock


def mark(workdir: Path, status: str, name: str = "finetune", **outcome: object) -> None:
    """What a stage writes into its folder."""
    (workdir / name).mkdir(parents=True, exist_ok=True)
    content = {"stage": name, "status": status, "config": {}, "inputs": {}, "outcome": outcome}
    (workdir / name / "manifest.json").write_text(json.dumps(content))


def told(workdir: Path, name: str = "finetune") -> tuple[float, int, int]:
    phase = json.loads((workdir / "summary.json").read_text())["phases"][name]
    return phase["seconds"], phase["calls"], phase["lost"]


def work(workdir: Path, clock, seconds: float, status: str = "done", error: Callable[..., BaseException] | None = None) -> Phases:
    """One call; ``error``: how it ends."""
    phases = Phases(workdir)
    try:
        with phases("finetune"):
            mark(workdir, "running")
            clock.now += seconds
            if error:
                raise error("no")
            mark(workdir, status)
    except (Preempted, KeyboardInterrupt, InputError):
        pass
    return phases


def test_time_is_added_up_over_calls_that_were_stopped(tmp_path, clock):
    work(tmp_path, clock, 5, error=Preempted)
    assert told(tmp_path) == (5, 1, 0)
    work(tmp_path, clock, 7, error=KeyboardInterrupt)
    work(tmp_path, clock, 2)
    assert told(tmp_path) == (14, 3, 0)
    phases = work(tmp_path, clock, 0.5)  # done already: its time is not that of a phase
    assert phases.passed["finetune"].before and phases.passed["finetune"].seconds == 14


def killed(workdir: Path) -> list[object]:
    """A call whose process is gone in the middle of the phase; what it holds must not be closed by the garbage collector."""
    phase = Phases(workdir)("finetune")
    phase.__enter__()
    mark(workdir, "running")
    return [phase]


def test_calls_that_were_killed_are_known_to_be_missing(tmp_path, clock):
    alive = killed(tmp_path)  # before anything was written of it
    assert not (tmp_path / "summary.json").exists()
    work(tmp_path, clock, 5, error=Preempted)
    assert told(tmp_path) == (5, 1, 1)
    alive += killed(tmp_path)
    alive += killed(tmp_path)
    work(tmp_path, clock, 2)
    assert told(tmp_path) == (7, 2, 3)


def test_a_stage_that_is_gone_and_made_anew_has_an_account_of_its_own(tmp_path, clock):
    work(tmp_path, clock, 5)
    (tmp_path / "finetune" / "manifest.json").unlink()
    work(tmp_path, clock, 3)
    assert told(tmp_path) == (3, 1, 0)


def test_what_another_command_did_was_not_timed(tmp_path, clock):
    mark(tmp_path, "done", warnings=["step 3: something"])
    phases = Phases(tmp_path)
    with phases("finetune"):
        clock.now += 1
    phase = phases.passed["finetune"]
    assert (phase.before, phase.calls, phase.lost, phase.warnings) == (True, 0, 0, {"step 3: something": 1})


def test_bad_input_leaves_no_trace(tmp_path, clock):
    phases = Phases(tmp_path / "new")
    with pytest.raises(InputError), phases("finetune"):
        raise InputError("no")
    assert not (tmp_path / "new").exists()
    work(tmp_path, clock, 5, error=Preempted)
    before = (tmp_path / "summary.json").read_bytes()
    work(tmp_path, clock, 5, error=InputError)
    assert (tmp_path / "summary.json").read_bytes() == before
    (tmp_path / "summary.json").unlink()
    work(tmp_path, clock, 5, error=InputError)
    assert not (tmp_path / "summary.json").exists()


def test_warnings_are_counted_and_shown_as_ever(tmp_path, clock, caplog):
    phases = Phases(tmp_path)
    with phases("finetune"):
        for _ in range(3):
            logging.getLogger("data").warning("%d records are cut", 4)
        logging.getLogger("data").info("no warning")
        mark(tmp_path, "done", warnings=["4 records are cut", "step 9: from before the kill"])
    logging.getLogger("data").warning("outside")
    assert phases.passed["finetune"].warnings == {"4 records are cut": 3, "step 9: from before the kill": 1}
    assert caplog.text.count("4 records are cut") == 3


def test_a_file_that_is_no_summary_is_left_alone(tmp_path):
    (tmp_path / "summary.json").write_text('{"phases": {"finetune": {"hours": 1}}}')
    with pytest.raises(InputError, match=r"summary\.json: not a summary of ours"):
        Phases(tmp_path)
