"""Runs on gs://, where orbax writes checkpoints itself: by one process, and by two that see no common folder.

The emulator does not know ``ifGenerationMatch``, so that claims are tested on S3 alone.
"""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from tests.parallel.test_processes import ROOT, Together
from tests.stores.test_runs import exports, flags, local_run  # noqa: F401 - a fixture


def gcs_environment(port: int) -> dict[str, str]:
    """Where gcsfs and tensorstore find an emulator on this machine, which knows no gRPC and asks for nobody's name."""
    address = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "FSSPEC_GS": '{"token": "anon"}',
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
    }  # fmt: skip


@pytest.fixture(scope="module")
def gcs(tmp_path_factory):
    """Environment variables of who asks an emulator."""
    for package in ("gcp_storage_emulator", "gcsfs"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'panacea_jax[test-gcs]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path_factory.mktemp("gcs") / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "tests.stores.gcs", str(port)], cwd=ROOT, stdout=log, stderr=log)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield gcs_environment(port)
    server.kill()
    server.wait()


def fetched(address, environment, folder):
    """What is at an address, by name."""
    code = "import sys, fsspec; fsspec.filesystem('gs').get(sys.argv[1].removeprefix('gs://') + '/', sys.argv[2] + '/', recursive=True)"
    subprocess.run([sys.executable, "-c", code, address, str(folder)], env=os.environ | environment, check=True, capture_output=True)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(count, arguments, tmp_path, name):
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    started = Together(cache, tmp_path / name, count, arguments)
    return started, started.wait()


def test_two_processes_train_and_answer_without_a_common_folder(local_run, gcs, monkeypatch, tmp_path):  # noqa: F811
    place, wanted = local_run
    for key, value in (gcs | {"PANACEA_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(key, value)
    workdir = "gs://bucket/two/run"
    started, codes = run(2, ["run", *flags(place, workdir)], tmp_path, "first")
    assert codes == [0, 0], [started.said(i)[-3000:] for i in range(2)]
    found = fetched(workdir, gcs, tmp_path / "found")
    assert "finetune/checkpoints/4/state/manifest.ocdbt" in found
    assert exports(found, workdir).keys() == wanted.keys()

    # one process goes on from what two have left, on a machine that has seen nothing of it
    shutil.rmtree(tmp_path / "cache")
    started, codes = run(1, ["run", *flags(place, workdir)], tmp_path, "then")
    assert codes == [0], started.said(0)[-3000:]
    started, codes = run(1, ["verify", f"--workdir={workdir}"], tmp_path, "verify")
    assert codes == [0], started.said(0)[-3000:]


def test_checkpoints_that_orbax_writes_itself_are_gone_on_from(local_run, gcs, monkeypatch, tmp_path):  # noqa: F811
    place, wanted = local_run
    for key, value in (gcs | {"PANACEA_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(key, value)
    workdir = "gs://bucket/one/run"
    command = [sys.executable, "-m", "panacea_jax.cli", "run", *flags(place, workdir)]
    stopped = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for line in stopped.stderr:
        if line.startswith("== finetune"):
            break
    time.sleep(4)
    stopped.kill()
    stopped.communicate()
    shutil.rmtree(tmp_path / "cache")
    started, codes = run(1, ["run", *flags(place, workdir)], tmp_path, "then")
    assert codes == [0], started.said(0)[-3000:]
    assert exports(fetched(workdir, gcs, tmp_path / "found"), workdir) == wanted
