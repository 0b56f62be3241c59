"""Real processes that run one command line together over gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from panacea_jax.errors import InputError
from panacea_jax.parallel import lifeline, processes
from tests.on_devices import xla_flags
from tests.runs import make_place, rewrite_manifest

ROOT = Path(__file__).parents[2]
STEPS = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def cache():
    """Compiled programs, so that a resumed run starts as fast as a real one would: those of the whole session."""
    return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])


class Together:
    """One command in several processes on this machine."""

    def __init__(
        self, cache: Path, logs: Path, count: int, arguments, devices=1, own=(), module="panacea_jax.cli"
    ):  # fmt: skip
        """``own[i]`` are further arguments of process i."""
        logs.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(devices),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.logs = [logs / f"{i}.log" for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            place = (
                [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"]
                if count > 1
                else []
            )
            command = [sys.executable, "-m", module, *arguments, *place]
            command += own[i] if own else []
            with log.open("w") as stream:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=stream, stderr=stream)
                )

    def wait(self, seconds=300):
        """Exit codes."""
        end = time.monotonic() + seconds
        try:
            return [p.wait(max(0.1, end - time.monotonic())) for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()

    def said(self, i):
        return self.logs[i].read_text()

    def until(self, condition, seconds=200):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, [self.said(i)[-2000:] for i in range(len(self.logs))]
            assert all(p.poll() is None for p in self.processes), self.said(0)[-2000:]
            time.sleep(0.1)


def _finetune(place, workdir, *more):
    flags = place.flags(
        f"--config.train.steps={STEPS}", "--config.checkpoint.every=4", "--config.data.shuffle=True",
        "--config.checkpoint.keep=20", *more,
    )  # fmt: skip
    return ["finetune", *flags, f"--workdir={workdir}"]


def _adapter(workdir):
    return load_file(workdir / "finetune" / "adapter" / "adapter_model.safetensors")


def _error(a, b):
    return max(float(np.linalg.norm(a[n] - b[n]) / np.linalg.norm(b[n])) for n in b)


@pytest.fixture(scope="module")
def alone(place, cache, tmp_path_factory):
    """The run of one process with one device."""
    root = tmp_path_factory.mktemp("alone")
    run = Together(cache, root / "logs", 1, _finetune(place, root / "run"))
    assert run.wait() == [0], run.said(0)
    return root / "run"


@pytest.fixture(scope="module")
def four(place, cache, tmp_path_factory):
    """The run of four processes, never interrupted."""
    root = tmp_path_factory.mktemp("four")
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    run = Together(cache, root / "logs", 4, _finetune(place, root / "run", *mesh))
    assert run.wait() == [0] * 4, run.said(0)
    return root / "run"


def _checkpoints(workdir):
    folder = workdir / "finetune" / "checkpoints"
    return [int(p.name) for p in folder.glob("*") if p.name.isdigit()] if folder.is_dir() else []


def test_four_processes_equal_one(alone, four):
    assert _error(_adapter(four), _adapter(alone)) < 1e-5
    rows = [(w / "finetune" / "metrics.jsonl").read_text().splitlines() for w in (alone, four)]
    assert [json.loads(r)["step"] for r in rows[1]] == [json.loads(r)["step"] for r in rows[0]]
    losses = [[json.loads(r)["loss"] for r in each] for each in rows]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    manifest = json.loads((four / "finetune" / "manifest.json").read_text())
    assert manifest["processes"] == 4 and len(manifest["devices"]) == 4


def test_every_stage_in_two_processes(place, cache, tmp_path):
    """The same answers, verdicts and coefficients as one process gives, each file written once."""
    more = (
        "--config.align.defence.name=sft", "--config.align.train.steps=3", "--config.align.train.batch_size=4",
        "--config.heal.defence.name=random_perturbation", "--config.heal.defence.rho=0.25", "--config.train.steps=4",
    )  # fmt: skip
    found = []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        arguments = ["run", *place.flags(*more), f"--workdir={workdir}"]
        run = Together(cache, tmp_path / f"logs{count}", count, arguments)
        assert run.wait() == [0] * count, [run.said(i) for i in range(count)]
        files = {p.relative_to(workdir) for p in workdir.rglob("*") if p.is_file()}
        found.append(
            {f for f in files if "checkpoints" not in f.parts and "tfevents" not in f.name}
        )
    assert found[0] == found[1]
    one, two = tmp_path / "1", tmp_path / "2"
    for name in sorted(p.name for p in (one / "generations").glob("*.jsonl")):
        assert (one / "generations" / name).read_text() == (two / "generations" / name).read_text()
    for stage in ("align", "finetune", "heal"):
        file = f"{stage}/adapter/adapter_model.safetensors"
        assert _error(load_file(two / file), load_file(one / file)) < 1e-5
    said = (tmp_path / "logs2" / "1.log").read_text().splitlines()
    assert not [line for line in said if not line.startswith("[Gloo]")]  # the first alone speaks


@pytest.mark.parametrize(("count", "devices"), [(1, 1), (2, 4)])
def test_a_checkpoint_of_four_goes_on_elsewhere(place, cache, four, tmp_path, count, devices):
    workdir = _cut(four, tmp_path / "run", 20)
    sizes = {"data": 2, "fsdp": 2, "tensor": 2} if devices > 1 else {}
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
    arguments = _finetune(place, workdir, *mesh)
    run = Together(cache, tmp_path / "logs", count, arguments, devices=devices)
    assert run.wait() == [0] * count, run.said(0)
    assert "resumed from" in run.said(0) and "/20" in run.said(0)
    assert _error(_adapter(workdir), _adapter(four)) < 1e-5


CLI, CUT = "panacea_jax.cli", "tests.parallel.cut"
FULL = ("--config.train.full_parameters=True", "--config.optimizer.learning_rate=1e-3")
# Flags, further ones of the two, what runs them, what is exported.
IN_TWO = {
    "all parameters": (FULL, (), CLI, "model/model.safetensors"),
    "packed": ((), ("--config.data.packing=True",), CLI, "adapter/adapter_model.safetensors"),
    "adapter cut": ((), (), CUT, "adapter/adapter_model.safetensors"),
}


@pytest.mark.parametrize("case", IN_TWO)
def test_in_two_processes(place, cache, tmp_path, case):
    """What is exported is gathered from shards that no process holds alone, and is what one process trains, with a row for each record."""
    flags, of_two, module, exported = IN_TWO[case]
    for count, more in ((1, ()), (2, of_two)):
        workdir = f"--workdir={tmp_path / str(count)}"
        arguments = ["finetune", *place.flags("--config.train.steps=6", *flags, *more), workdir]
        run = Together(cache, tmp_path / f"logs{count}", count, arguments, module=module)
        assert run.wait() == [0] * count, [run.said(i) for i in range(count)]
    one, two = (tmp_path / str(n) / "finetune" for n in (1, 2))
    for file in (exported, "epsilon.safetensors"):
        assert _error(load_file(two / file), load_file(one / file)) < 1e-5


def _cut(finished, workdir, step):
    """A copy of a finished run as if it had been stopped after ``step``."""
    import shutil

    shutil.copytree(finished, workdir)
    stage = workdir / "finetune"
    for later in (s for s in _checkpoints(workdir) if s > step):
        shutil.rmtree(stage / "checkpoints" / str(later))
    shutil.rmtree(stage / "adapter")
    rewrite_manifest(stage, status="running")
    return workdir


@pytest.mark.parametrize("victim", [0, 3])
def test_one_killed_stops_all_and_the_restart_is_bit_equal(place, cache, four, tmp_path, victim):
    workdir = tmp_path / "run"
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    run = Together(cache, tmp_path / "logs", 4, _finetune(place, workdir, *mesh))
    run.until(lambda: len(_checkpoints(workdir)) >= 2)
    run.processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    codes = run.wait(120)
    assert time.monotonic() - killed < 60
    others = [i for i in range(4) if i != victim]
    assert codes[victim] == -signal.SIGKILL and all(codes[i] not in (0, None) for i in others)
    if victim:
        for i in others:
            assert f"process {victim} " in run.said(i), run.said(i)
    again = Together(cache, tmp_path / "again", 4, _finetune(place, workdir, *mesh))
    assert again.wait() == [0] * 4, again.said(0)
    assert "resumed from" in again.said(0)
    want, got = _adapter(four), _adapter(workdir)
    assert all(want[n].tobytes() == got[n].tobytes() for n in want)


def test_one_of_two_killed_stops_the_other_and_both_go_on(place, cache, tmp_path):
    whole = Together(cache, tmp_path / "logs", 2, _finetune(place, tmp_path / "whole"))
    assert whole.wait() == [0, 0], whole.said(0)
    assert "waiting for the other processes of this run at 127.0.0.1:" in whole.said(1)
    workdir = tmp_path / "run"
    run = Together(cache, tmp_path / "killed", 2, _finetune(place, workdir))
    run.until(lambda: len(_checkpoints(workdir)) >= 2)
    run.processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert run.wait(120)[0] == 1 and time.monotonic() - killed < 60
    lines = [line for line in run.said(0).splitlines() if line.startswith("panacea: ")]
    assert len(lines) == 1 and lines[0].startswith("panacea: process 1 (") and "Start all of them again" in lines[0], run.said(0)
    again = Together(cache, tmp_path / "again", 2, _finetune(place, workdir))
    assert again.wait() == [0, 0], again.said(0)
    want, got = _adapter(tmp_path / "whole"), _adapter(workdir)
    assert "resumed from" in again.said(0) and all(want[n].tobytes() == got[n].tobytes() for n in want)


def test_sigterm_to_one_saves_and_stops_all(place, cache, four, tmp_path):
    workdir = tmp_path / "run"
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    run = Together(cache, tmp_path / "logs", 4, _finetune(place, workdir, *mesh))
    run.until(lambda: len(_checkpoints(workdir)) >= 1)
    run.processes[2].send_signal(signal.SIGTERM)
    assert run.wait(120) == [75] * 4, [run.said(i) for i in range(4)]
    assert "stopped by SIGTERM after step" in run.said(0)
    # A signal that comes before the resumed run's first step is kept until then.
    resumed = Together(cache, tmp_path / "resumed", 4, _finetune(place, workdir, *mesh))
    resumed.until(lambda: "resumed from" in resumed.said(0))
    resumed.processes[1].send_signal(signal.SIGTERM)
    assert resumed.wait(120) == [75] * 4, [resumed.said(i) for i in range(4)]
    again = Together(cache, tmp_path / "again", 4, _finetune(place, workdir, *mesh))
    assert again.wait() == [0] * 4, again.said(0)
    want, got = _adapter(four), _adapter(workdir)
    assert all(want[n].tobytes() == got[n].tobytes() for n in want)


@pytest.mark.parametrize("key", ["optimizer.learning_rate=0.5", "mesh.tensor=2"])
def test_processes_that_disagree_stop(place, cache, tmp_path, key):
    """Also about what changes the program and not the outcome: they would wait for each other for ever."""
    arguments = _finetune(place, tmp_path / "run")
    own = [[], [f"--config.{key}"]]
    run = Together(cache, tmp_path / "logs", 2, arguments, own=own)
    assert run.wait(100) == [2, 2], [run.said(i) for i in range(2)]
    said = f"process 1 differs from process 0: config.{key.partition('=')[0]}"
    assert all(said in run.said(i) for i in range(2)), [run.said(i) for i in range(2)]
    assert not (tmp_path / "run").exists()


ENVIRONMENT = (
    "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES",
    "SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE",
    "JAX_LOCAL_DEVICE_IDS",
)  # fmt: skip


@pytest.fixture
def env(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch.setenv


def test_the_place_is_found(env):
    assert processes.find_place() is None
    assert processes.find_place("h:1", 4, 3) == ("h:1", 4, 3)
    assert processes.find_place("h:1", 1, 0) is None
    assert processes.find_place("auto") == (None, None, None)
    assert processes.find_place("h:1") == ("h:1", None, None)  # a launcher says the rest
    env("SLURM_STEP_NUM_TASKS", "1")
    assert processes.find_place() is None
    env("MEGASCALE_NUM_SLICES", "2")  # of one machine each
    assert processes.find_place() == (None, None, None)
    env("MEGASCALE_NUM_SLICES", "1")
    env("SLURM_STEP_NUM_TASKS", "2")
    assert processes.find_place() == (None, None, None)
    env("JAX_COORDINATOR_ADDRESS", "a:2")
    env("JAX_NUM_PROCESSES", "8")
    env("JAX_PROCESS_ID", "7")
    assert processes.find_place() == ("a:2", 8, 7)
    assert processes.find_place("h:1", 4, 3) == ("h:1", 4, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("host", 2, 0), "--coordinator=host: HOST:PORT"),
        (("h:1", 2, None), "--num_processes and --process_id: both"),
        (("h:1", 2, 2), "--process_id=2: one of 0 … 1"),
        (("", 2, 0), "--coordinator is not set"),
    ],
)
def test_half_a_place_is_refused(env, arguments, said):
    with pytest.raises(InputError, match=said.replace("…", ".")):
        processes.find_place(*arguments)


def test_half_a_place_in_the_environment_is_refused(env):
    env("JAX_PROCESS_ID", "2")
    with pytest.raises(InputError, match="--coordinator is not set"):
        processes.find_place()


@pytest.mark.parametrize(
    ("name", "value", "all_of_them"),
    [
        ("SLURM_STEP_TASKS_PER_NODE", "1", True),
        ("SLURM_STEP_TASKS_PER_NODE", "1(x4)", True),
        ("SLURM_STEP_TASKS_PER_NODE", "8(x4)", False),
        ("SLURM_STEP_TASKS_PER_NODE", "1,2", False),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "1", True),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "4", False),
        ("JAX_LOCAL_DEVICE_IDS", "3", False),
    ],
)
def test_one_process_a_machine_takes_all_its_devices(env, monkeypatch, name, value, all_of_them):
    """jax alone would give a process under SLURM one GPU, whatever the number of tasks on its node."""
    env(name, value)
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **_: given.append(a))
    monkeypatch.setattr(lifeline.Lifeline, "start", lambda self: None)
    with processes.joined(processes.Place("h:1", 2, 0)):
        pass
    assert given == [("h:1", 2, 0, [] if all_of_them else None)]


@pytest.fixture
def guard(monkeypatch):
    """Of process 0 of 2; it raises where it would end the process."""

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(lifeline.jax, "process_count", lambda: 2)
    monkeypatch.setattr(lifeline.os, "_exit", end)
    monkeypatch.setattr(lifeline.Lifeline, "leave", lambda *_: None)
    return lifeline.Lifeline()


def _sign(at, end="", code=1):
    return {"host": "node", "beat": 0, "at": at, "end": end, "code": code}


def test_a_hang_says_where_everybody_is(guard, monkeypatch, caplog):
    """Also before the first step; more rarely each time; and again once something has moved."""
    now = [1000.0]
    monkeypatch.setattr(lifeline.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lifeline, "SILENCE", 1e9)
    guard.at = "step 1 of 9"

    def warnings_at(second):
        now[0] = 1000.0 + second
        caplog.clear()
        guard._look({0: _sign(guard.at), 1: _sign(guard.at)})
        return [record.getMessage() for record in caplog.records]

    assert warnings_at(0) == [] and warnings_at(299) == []
    (said,) = warnings_at(301)
    assert "0 (node): step 1 of 9, 1 (node): step 1 of 9" in said
    assert warnings_at(500) == [] and len(warnings_at(602)) == 1 and warnings_at(1100) == []
    guard.at = "step 2 of 9"
    assert warnings_at(1200) == [] and len(warnings_at(1501)) == 1


def test_who_waits_at_a_meeting_says_soon_for_whom(guard, monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr(lifeline.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lifeline, "SILENCE", 1e9)
    guard.at = "meeting 3"
    for second in (0, 9, 11, 19, 21, 39, 41):
        now[0] = 1000.0 + second
        guard._look({0: _sign("meeting 3"), 1: _sign("step 7 of 9")})
    assert [r.getMessage().partition(";")[0] for r in caplog.records] == [
        f"waiting for {seconds} s for processes 1 (node): step 7 of 9" for seconds in (10, 20, 40)
    ]


def test_the_others_end_with_the_code_of_the_first_to_stop(guard, capfd):
    with pytest.raises(SystemExit) as ended:
        guard._look({0: _sign("step 2 of 9"), 1: _sign("", "config.x = 1: no", 2)})
    assert ended.value.code == 2
    assert "process 1 (node) stopped: config.x = 1: no" in capfd.readouterr().err


def test_first_change():
    a = {"x": 1, "y": {"z": [1, 2]}}
    assert processes.first_change(a, {"x": 1, "y": {"z": [1, 2]}}) == ""
    assert (
        processes.first_change(a, {"x": 1, "y": {"z": [1, 3]}}) == "y.z: [1, 2] there, [1, 3] now"
    )
    assert processes.first_change(a, {"x": 1}) == "y: {'z': [1, 2]} there, None now"


def test_alone_nothing_waits():
    assert jax.process_count() == processes.count() == 1 and processes.first()
    processes.barrier()
    processes.agree(Path("x"), {"a": 1})
    assert processes.once(lambda: 5) == 5
    processes.leave()
    processes.abandon(3)
