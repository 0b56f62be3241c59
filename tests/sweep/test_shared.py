"""Real processes that are killed, and that share a sweep."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS_OPTUNA = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="an optional extra")


def start(workdir, seconds, *keys):
    command = [sys.executable, "-m", "tests.sweep.worker", str(workdir), str(seconds), *keys]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def log(workdir):
    path = workdir / "log"
    return [line.split() for line in path.read_text().splitlines()] if path.is_file() else []


def kill_after(process, workdir, ends):
    """SIGKILL in the middle of a run, once so many ended."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        assert process.poll() is None, process.communicate()[0]
        lines = log(workdir)
        if sum(word == "end" for word, *_ in lines) >= ends and lines[-1][0] == "begin":
            break
        time.sleep(0.005)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    process.communicate()


def both_end(workdir, *keys):
    (workdir / "hold").touch()
    pair = [start(workdir, 0.2, *keys) for _ in range(2)]  # longer than the search is locked, so that both come by
    limit = time.monotonic() + 60
    while not all((workdir / f"ready.{process.pid}").exists() for process in pair) and time.monotonic() < limit:
        time.sleep(0.01)
    (workdir / "hold").unlink()
    said = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    return [str(process.pid) for process in pair]


@pytest.mark.parametrize(
    ("keys", "total"),
    [((), 60), pytest.param(("sampler=tpe", "trials=24"), 24, marks=NEEDS_OPTUNA)],
    ids=["grid", "tpe"],
)
def test_killed_three_times_and_then_shared_by_two(keys, total, tmp_path):
    killed = 3 if not keys else 1
    for ends in [total * (i + 1) // 6 for i in range(killed)]:
        kill_after(start(tmp_path, 0.05, *keys), tmp_path, ends)
    pids = both_end(tmp_path, *keys)
    lines = log(tmp_path)
    begins, ends = ([name for word, name, _ in lines if word == wanted] for wanted in ("begin", "end"))
    assert len(ends) == len(set(ends)) == total  # none is lost, none doubled
    assert len(begins) <= total + killed  # what was killed began twice, and nothing else did
    assert all(sum(word == "end" and pid == one for word, _, pid in lines) >= 2 for one in pids)
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert sum(len(row["folders"]) for row in result["rows"]) == total
    assert {row["status"] for row in result["rows"]} == {"done"}
