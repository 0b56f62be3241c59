"""Booster, Booster + Vaccine, RepNoise and TAR on fsdp 4 × tensor 2 train what one device does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_model

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_eight_devices_train_what_one_does(tmp_path):
    folder = write_model(tmp_path / "base")
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.sharded_alignment", str(folder)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("devices") == 8
    assert set(found) == {"booster", "booster_vaccine", "repnoise", "tar"}
    for name, of in found.items():
        assert of["error"] < 1e-5, (name, of)
        assert of["moved"] > 1e-3, (name, of)
