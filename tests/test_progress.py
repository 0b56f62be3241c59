"""Lines of progress in a log file: what is done, and how long the rest takes once that is known."""

import pytest

from panacea_jax import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def at(seconds):
        now[0] = float(seconds)

    return at


def test_what_is_left_is_said_once_the_rate_is_known(clock, capsys):
    """The first step waits 40 s for a compilation, those after it take 5 s."""
    with progress.Progress("train", 500) as bar:
        for step in range(8):
            clock(40 + 5 * step)
            bar.advance(f"loss {step}")
    assert capsys.readouterr().err.splitlines() == [
        "train 1/500 loss 0",
        "train 8/500 loss 7 0:41:00 left",  # 492 steps of 5 s
    ]


def test_a_burst_of_answers_is_no_rate(clock, capsys):
    """Answers come a batch at a time: of the first batch all but one seem to take no time."""
    with progress.Progress("generate", 96) as bar:
        clock(29.9)
        bar.advance()
        clock(30.1)
        bar.advance(by=31)
        clock(70.1)
        bar.advance(by=32)
    assert capsys.readouterr().err.splitlines() == ["generate 32/96", "generate 64/96 0:00:20 left"]  # 63 in 40.2 s


def test_what_was_done_before_has_no_part_in_the_rate(clock, capsys):
    with progress.Progress("train", 200, start=100) as bar:
        for second in (31, 41, 51, 62):
            clock(second)
            bar.advance()
    assert capsys.readouterr().err.splitlines() == ["train 101/200", "train 104/200 0:16:32 left"]  # 96 of 31 s / 3
