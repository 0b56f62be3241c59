"""Where arrays go, and that a sharded run computes what a single device does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec

from panacea_jax.errors import InputError
from panacea_jax.parallel.mesh import make_mesh
from panacea_jax.parallel.sharding import (
    batch_rows,
    batch_sharding,
    bytes_per_device,
    replicated,
    weight_sharding,
)
from tests.tiny import write_model

ROOT = Path(__file__).parents[2]


def mesh(*sizes):
    """A mesh of one device in many places: enough for rules, which only look at sizes."""
    count = sizes[0] * sizes[1] * sizes[2]
    return make_mesh(*sizes, devices=list(jax.devices()[:1]) * count)


@pytest.mark.parametrize(
    ("path", "shape", "wanted"),
    [
        ("embed_tokens/embedding", (64, 32), ("tensor", "fsdp")),
        ("lm_head/kernel", (32, 64), ("fsdp", "tensor")),
        *(
            (f"layers/self_attn/{p}_proj/kernel", (3, 32, 64), (None, "fsdp", "tensor"))
            for p in "qkv"
        ),
        *(
            (f"layers/mlp/{p}_proj/kernel", (3, 32, 64), (None, "fsdp", "tensor"))
            for p in ("gate", "up")
        ),
        ("layers/self_attn/o_proj/kernel", (3, 64, 32), (None, "tensor", "fsdp")),
        ("layers/mlp/down_proj/kernel", (3, 64, 32), (None, "tensor", "fsdp")),
        ("layers/self_attn/q_proj/bias", (3, 64), (None, "tensor")),
        ("layers/self_attn/o_proj/bias", (3, 64), ()),
        ("layers/input_layernorm/scale", (3, 32), ()),
        ("norm/scale", (32,), ()),
    ],
)
def test_rules(path, shape, wanted):
    assert weight_sharding(mesh(2, 2, 4), path, shape).spec == PartitionSpec(*wanted)


@pytest.mark.parametrize(
    ("shape", "uneven", "said"),
    [
        ((3, 32, 64), (None, "fsdp", "tensor"), ""),
        ((3, 33, 64), (None, None, "tensor"), "fsdp = 2: does not divide 33, dimension 1 of"),
        ((3, 32, 66), (None, "fsdp", None), "tensor = 4: does not divide 66, dimension 2 of"),
        ((3, 33, 66), (None, None, None), "fsdp = 2: does not divide 33, dimension 1 of"),
    ],
)
def test_an_axis_that_does_not_divide(shape, uneven, said):
    path = "layers/self_attn/k_proj/kernel"
    if said:
        with pytest.raises(InputError, match=rf"config\.mesh\.{said} {path} \[3, "):
            weight_sharding(mesh(1, 2, 4), path, shape)
    else:
        weight_sharding(mesh(1, 2, 4), path, shape)
    sharding = weight_sharding(mesh(1, 2, 4), path, shape, uneven=True)
    assert sharding.spec == PartitionSpec(*uneven)
    sharding.shard_shape(shape)  # raises where an axis does not divide


def test_a_vocabulary_may_be_odd():
    for path, shape, spec in (
        ("embed_tokens/embedding", (32001, 64), (None, "fsdp")),
        ("lm_head/kernel", (64, 32001), ("fsdp", None)),
    ):
        assert weight_sharding(mesh(1, 2, 4), path, shape).spec == PartitionSpec(*spec)


def test_batches_and_adapters():
    m = mesh(2, 3, 4)
    assert batch_rows(m) == 6
    assert batch_sharding(m).shard_shape((12, 7)) == (2, 7)
    assert replicated(m).shard_shape((12, 7)) == (12, 7)


def test_bytes_per_device():
    sharding = weight_sharding(mesh(1, 2, 4), "layers/mlp/up_proj/kernel", (3, 32, 64))
    assert bytes_per_device(sharding, (3, 32, 64), 2) == 3 * 16 * 16 * 2


@pytest.mark.slow
def test_eight_devices_train_what_one_does(tmp_path):
    """Ten Panacea steps on four meshes: the same adapter and ε; on 2×2×2 the same greedy answers, and a quarter of a matrix a device."""
    folder = write_model(tmp_path / "base")
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.sharded", str(folder)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    assert found["whole"] == [2, 32, 32] and found["shard"] == [2, 16, 16]
    assert found["trained"] > 1e-3 and found["moved"] > 1e-3
    assert set(found["meshes"]) == {"8×1×1", "1×8×1", "1×4×2", "2×2×2"}
    for mesh, run in found["meshes"].items():
        assert run["error"] < 1e-5 and run["error_epsilon"] < 1e-4, (mesh, run)
        assert run["compilations"] == 1, mesh
    [whole, shard] = found["cache"]
    assert shard == [
        whole[0] // 4,
        whole[1] // 2,
        *whole[2:],
    ]  # rows over data and fsdp, heads over tensor
    assert found["answers"][0] == found["answers"][1]


@pytest.mark.slow
def test_eight_devices_heal_as_one_does(tmp_path):
    """mesh fsdp = 4, tensor = 2: every healing method deploys what it does on one device."""
    write_model(tmp_path / "base")
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.sharded_heal", str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8 and len(found["methods"]) == 6
    for name, (error, changed) in found["methods"].items():
        assert error < 1e-5, f"{name}: {error}"
        assert changed >= 3, name
