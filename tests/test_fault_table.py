"""Faults while a run is at work, by kind: one line says what is the matter, nothing is lost, the same command goes on to the same end.

The table is in docs/trust.md. Full disks at a save are in train/test_full_disk.py, processes that die in parallel/test_processes.py.
"""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from panacea_jax import workdir as workdirs
from panacea_jax.train.metrics import MetricsWriter
from tests.runs import make_place, panacea
from tests.test_workdir import ELSEWHERE

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("faults") / "place")


def training(place, workdir, *more):
    return ["finetune", *place.flags("--config.defence.name=sft", "--config.checkpoint.every=1", *more), f"--workdir={workdir}"]


def answering(place, workdir):
    return ["generate", *place.flags(f"--config.eval.tasks=('{place.spec('goals')}',)"), f"--workdir={workdir}"]


def exported(workdir):
    return (workdir / "finetune" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """What comes out of both commands where nothing happens."""
    workdir = tmp_path_factory.mktemp("whole")
    assert panacea(*training(place, workdir)) == 0
    shutil.copytree(workdir, answered := tmp_path_factory.mktemp("answered") / "run")
    assert panacea(*answering(place, answered)) == 0
    return workdir, (answered / "generations" / "advbench.jsonl").read_bytes()


def one_line(capsys):
    """The only line that is an error of ours; nothing else but what a run says of itself."""
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("panacea: ")]
    assert len(said) == 1 and not any("Traceback" in line for line in lines), lines
    return said[0]


@contextlib.contextmanager
def failing_sync(monkeypatch, number, name, times=1):
    """The so many-th time that a file of this name is brought to the disk, the system says no, as a full or lost one does this late."""
    real, left = os.fsync, [times]

    def fsync(file):
        descriptor = file if isinstance(file, int) else file.fileno()
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name in path.name:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(number, os.strerror(number), str(path))
        return real(file)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        yield
    assert left[0] <= 0, "the file was never written"


@pytest.mark.parametrize(
    ("number", "name", "said"),
    [
        (errno.ENOSPC, "adapter_model", "cannot be written (No space left on device); make room"),
        (errno.EFBIG, "adapter_model", "cannot be written (File too large); make room"),
        (errno.EIO, "adapter_model", "cannot be used any more (Input/output error); put that right"),
        (errno.EROFS, "manifest.json", "cannot be used any more (Read-only file system); put that right"),
        (errno.EACCES, "adapter_model", "cannot be used any more (Permission denied); put that right"),
    ],
)
def test_a_disk_that_says_no_at_the_export(place, whole, tmp_path, monkeypatch, capsys, number, name, said):
    workdir = tmp_path / "run"
    with failing_sync(monkeypatch, number, name, times=2 if name == "manifest.json" else 1):
        assert panacea(*training(place, workdir)) == 1
    line = one_line(capsys)
    assert said in line and line.endswith("and start the same command again") and str(workdir) in line
    assert not (workdir / "finetune" / "adapter").exists() or name == "manifest.json"
    assert panacea(*training(place, workdir)) == 0
    assert exported(workdir) == exported(whole[0])


def test_a_full_disk_when_answers_are_appended(place, whole, tmp_path, monkeypatch, capsys):
    workdir, answers = tmp_path / "run", whole[1]
    shutil.copytree(whole[0], workdir)
    with failing_sync(monkeypatch, errno.ENOSPC, "advbench", times=2):
        assert panacea(*answering(place, workdir)) == 1
    assert "cannot be written (No space left on device)" in one_line(capsys)
    assert panacea(*answering(place, workdir)) == 0
    assert (workdir / "generations" / "advbench.jsonl").read_bytes() == answers


def at_step(monkeypatch, step, do):
    """Do something once, when the metrics of a step are written."""
    real = MetricsWriter.write

    def write(self, number, scalars):
        if number == step:
            do()
        real(self, number, scalars)

    monkeypatch.setattr(MetricsWriter, "write", write)


@pytest.mark.parametrize("step", [3, 4])
def test_a_folder_that_vanishes(place, whole, tmp_path, monkeypatch, capsys, step):
    """As where a mount is lost: before a save, and before the last one and the export. What a save then writes in its place is no run."""
    workdir, away = tmp_path / "mount" / "run", tmp_path / "away"
    workdir.parent.mkdir()
    with monkeypatch.context() as patched:
        at_step(patched, step, lambda: workdir.rename(away))
        assert panacea(*training(place, workdir)) == 1
    assert f"{workdir}/finetune/" in (line := one_line(capsys)) and "cannot be used any more (No such file or directory)" in line
    if workdir.exists():  # a save that was under way makes its folders
        assert panacea(*training(place, workdir)) == 2 and "not ours, left alone" in one_line(capsys)
        shutil.rmtree(workdir)
    away.rename(workdir)
    assert panacea(*training(place, workdir)) == 0
    assert "resumed from" in capsys.readouterr().err and exported(workdir) == exported(whole[0])


def test_a_file_system_that_is_unmounted(place, whole, tmp_path):
    """The same with a real mount, of a run in a process of its own."""
    kept, mount = tmp_path / "kept", tmp_path / "mount"
    kept.mkdir()
    mount.mkdir()
    bind = ["mount", "--bind", str(kept), str(mount)]
    if shutil.which("mount") is None or subprocess.run(bind, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        run = started(training(place, mount / "run", "--config.train.steps=400"))
        until(lambda: checkpoints(mount / "run"), run)
        subprocess.run(["umount", "-l", str(mount)], check=True)
        _, said = run.communicate(timeout=200)
        assert run.returncode == 1 and "Traceback" not in said and said.count("panacea: ") == 1, said
        subprocess.run(bind, check=True)
        again = started(training(place, mount / "run", "--config.train.steps=400", "--config.checkpoint.every=100"))
        _, said = again.communicate(timeout=200)
        assert again.returncode == 0 and "resumed from" in said, said
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)


def started(command, prefix=()):
    words = [sys.executable, *prefix, "-m", "panacea_jax.cli", *command]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def checkpoints(workdir):
    return [p for p in (workdir / "finetune" / "checkpoints").glob("*") if p.name.isdigit()]


def until(condition, run, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and run.poll() is None, run.communicate(timeout=1)[1]
        time.sleep(0.02)


# Gives up root's right to pass over the modes of files (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH), for good, and becomes another Python.
AS_ANYBODY = (
    "import ctypes, os, sys; drop = ctypes.CDLL(None).prctl; drop(24, 1, 0, 0, 0); drop(24, 2, 0, 0, 0); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def test_permissions_that_are_taken_away(place, tmp_path):
    """By a real change of the mode, of a run in a process of its own."""
    (closed := tmp_path / "closed").touch(0)
    look = [sys.executable, "-c", AS_ANYBODY, "-c", f"open({str(closed)!r})"]
    if b"PermissionError" not in subprocess.run(look, capture_output=True).stderr:
        pytest.skip("the modes of files do not bind this user")
    workdir, steps = tmp_path / "run", "--config.train.steps=400"
    run = started(training(place, workdir, steps), prefix=("-c", AS_ANYBODY))
    until(lambda: checkpoints(workdir), run)
    (workdir / "finetune" / "checkpoints").chmod(0o500)
    _, said = run.communicate(timeout=200)
    assert run.returncode == 1 and "Traceback" not in said and said.count("panacea: ") == 1, said
    assert "cannot be used any more (Permission denied)" in said
    (workdir / "finetune" / "checkpoints").chmod(0o700)
    again = started(training(place, workdir, steps, "--config.checkpoint.every=100"), prefix=("-c", AS_ANYBODY))
    _, said = again.communicate(timeout=200)
    assert again.returncode == 0 and "resumed from" in said, said


def test_two_runs_in_one_folder(place, tmp_path, monkeypatch, capsys):
    """The second waits, says for whom, and is refused; with the first one gone, by whatever death, it does its work."""
    monkeypatch.setattr(workdirs, "LOCK_PATIENCE", 0.3)
    other = subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )  # fmt: skip
    with other:
        assert other.stdout is not None and other.stdout.readline() == "at work\n"
        manifest = tmp_path / "run" / "finetune" / "manifest.json"
        before = manifest.read_bytes()
        stage = workdirs.StageFolder(tmp_path / "run", "finetune", {}, {})
        with pytest.raises(workdirs.InputError, match=rf"another run is at work there \(.*, process {other.pid}, since 2.*\); wait"):
            stage.begin()
        said = capsys.readouterr().err
        assert said.startswith(f"waiting for the run that is at work in {stage.folder} (") and f"process {other.pid}" in said
        assert "0 s at most" in said and manifest.read_bytes() == before
        other.kill()
    stage.begin()
    stage.finish({})


def test_a_clock_that_goes_backwards(place, whole, tmp_path, monkeypatch, capsys):
    """An hour a look, through a stop and a resume; nothing is negative, and the newest checkpoint is the one of the last step."""
    now = [4e9]

    def wall():
        now[0] -= 3600
        return now[0]

    workdir = tmp_path / "run"
    monkeypatch.setattr(time, "time", wall)
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * wall()))
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        at_step(patched, 3, lambda: 1 / 0)
        panacea(*training(place, workdir))
    assert max(int(p.name) for p in checkpoints(workdir)) == 2
    # What the first one left says that it was made in a time that is still to come.
    for path in workdir.rglob("*"):
        os.utime(path, (8e9, 8e9))
    assert panacea(*training(place, workdir)) == 0
    said = capsys.readouterr().err
    assert f"resumed from {workdir}/finetune/checkpoints/2" in said and "-" not in said.rpartition("finetune: ")[2]
    from panacea_jax.train.metrics import read_metrics
    from panacea_jax.workdir import read_manifest

    assert all(row["step_seconds"] > 0 for row in read_metrics(workdir / "finetune"))
    assert min(read_manifest(workdir / "finetune")["outcome"]["seconds"].values()) >= 0
    assert exported(workdir) == exported(whole[0])
