"""A full disk: one line that names place and cause, exit code 1, nothing lost; with room the same command goes on."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from panacea_jax.errors import no_space
from panacea_jax.train.metrics import MetricsWriter
from tests.runs import make_place, panacea

ROOT = Path(__file__).parents[2]
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("full") / "place")


def flags(place, workdir, *more):
    chosen = ("--config.defence.name=sft", "--config.checkpoint.every=1", *more)
    return place.flags(*chosen, f"--workdir={workdir}")


def adapter(workdir):
    return (workdir / "finetune" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """What comes out where there is room."""
    workdir = tmp_path_factory.mktemp("whole")
    assert panacea("finetune", *flags(place, workdir)) == 0
    return adapter(workdir)


def failing_save(fail):
    real, left = ocp.CheckpointManager.save, [2]

    def save(self, *arguments, **more):
        left[0] -= 1
        if not left[0]:
            fail()
        return real(self, *arguments, **more)

    return ocp.CheckpointManager, "save", save


def failing_write(fail):
    real = MetricsWriter.write

    def write(self, step, scalars):
        if step == 3:
            fail()
        real(self, step, scalars)

    return MetricsWriter, "write", write


def by_the_system():
    raise OSError(errno.ENOSPC, "No space left on device", "/wug/checkpoints/2")


def by_a_thread_of_orbax():
    text = 'RESOURCE_EXHAUSTED: Error writing local file "/wug/ocdbt": Failed to write 378 bytes: No space left on device'
    raise ValueError(text)


def by_a_quota():
    try:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    except OSError as error:
        raise RuntimeError("the save failed") from error


@pytest.mark.parametrize(
    ("part", "fail", "line"),
    [
        (failing_save, by_the_system, "/wug/checkpoints/2: cannot be written (No space left on device)"),
        (failing_save, by_a_thread_of_orbax, "/wug/ocdbt: cannot be written (No space left on device)"),
        (failing_write, by_a_quota, "{workdir}: cannot be written (Disk quota exceeded)"),
    ],
)
def test_one_line_and_the_same_command_goes_on(place, whole, tmp_path, monkeypatch, capsys, part, fail, line):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(*part(fail))
        assert panacea("finetune", *flags(place, workdir)) == 1
    said = [s for s in capsys.readouterr().err.splitlines() if not s.startswith("resumed")]
    expected = f"panacea: {line.format(workdir=f'--workdir={workdir}')}; make room and start the same command again"
    assert said == [expected]
    assert panacea("finetune", *flags(place, workdir)) == 0
    assert "resumed from" in capsys.readouterr().err
    assert adapter(workdir) == whole


def test_other_errors_keep_their_traceback(place, tmp_path, monkeypatch):
    def fail():
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(*failing_write(fail))
    with pytest.raises(OSError, match="Bad file"):
        panacea("finetune", *flags(place, tmp_path))


def test_no_space_is_found_behind_other_errors():
    def raised(make):
        with pytest.raises(Exception) as found:
            make()
        return found.value

    assert no_space(raised(by_a_quota)) == ("", "Disk quota exceeded")
    assert no_space(raised(by_a_thread_of_orbax)) == ("/wug/ocdbt", "No space left on device")
    assert no_space(ExceptionGroup("two", [ValueError("x"), FULL])) == ("", "No space left on device")
    assert no_space(ValueError("there is no space in 'wug'")) is None
    circle = ValueError("x")
    circle.__cause__ = circle
    assert no_space(circle) is None


@pytest.fixture(params=["60k", "150k"])
def small(request, tmp_path):
    """A file system that has room for no checkpoint, or for one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True).returncode
    except OSError:
        done = 1
    if done:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_seen_from_outside(place, whole, small):
    """Orbax, tensorstore and asyncio keep quiet, in the run and at its end."""
    command = [sys.executable, "-m", "panacea_jax.cli", "finetune", *flags(place, small / "run")]

    def run():
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    first = run()
    assert first.returncode == 1, first.stderr
    assert first.stderr.count("\n") == 1 and first.stderr.startswith(f"panacea: {small}/run/finetune/"), first.stderr
    assert "cannot be written (No space left on device" in first.stderr
    subprocess.run(["mount", "-o", "remount,size=20M", str(small)], check=True)
    assert run().returncode == 0
    assert adapter(small / "run") == whole
