"""What loading and saving cost the host: memory, bytes read; measured in fresh processes by benchmarks/loading.py."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from panacea_jax.errors import InputError
from panacea_jax.models import model as models
from panacea_jax.models import tensorfile, weights
from tests.families import build, save
from tests.on_devices import xla_flags

ROOT = Path(__file__).parents[2]
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "loading.py"))
HIDDEN = 1024

measured = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux says what a process holds and reads"
)


def _folder(root, dtype, size):
    config = BENCHMARK["llama"](HIDDEN, BENCHMARK["layers_for"](size, HIDDEN, dtype))
    total = BENCHMARK["make_folder"](root / "model", config, dtype, 3)
    assert total == pytest.approx(size, rel=0.2)
    return root / "model"


def _tensors(folder):
    return {k: v.tobytes() for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


@measured
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_of_one_process(tmp_path, dtype):
    """No second copy: neither pages of the files nor a host buffer beside what stays; nor while saving, merged or not."""
    folder = _folder(tmp_path, dtype, 300e6)
    load, *saves = BENCHMARK["run"](folder, [1, 1, 1])
    assert load["kept"] >= 280e6 and load["times"] < 1.25
    assert 1 <= load["share"] < 1.05  # nothing read twice
    assert [s["step"] for s in saves] == ["save", "merge"]
    assert all(s["times"] < 0.4 for s in saves), saves
    assert _tensors(tmp_path / "save") == _tensors(folder)
    assert _tensors(tmp_path / "merge") == _tensors(folder)  # a fresh adapter's product is zero


@measured
@pytest.mark.parametrize("mesh", [[1, 4, 1], [1, 1, 4]])
def test_each_of_four_processes_reads_its_own(tmp_path, mesh):
    """Split over fsdp, and over tensor: rows of some matrices, columns of the others."""
    found = BENCHMARK["run"](_folder(tmp_path, "bfloat16", 300e6), mesh, 4, ("load",))
    assert len(found) == 4
    assert all(f["share"] <= 0.30 and f["times"] < 1.25 for f in found), found


@measured
def test_four_processes_save_what_they_loaded(tmp_path):
    folder = _folder(tmp_path, "bfloat16", 100e6)
    BENCHMARK["run"](folder, [1, 2, 2], 4, ("load", "save"))
    assert _tensors(tmp_path / "save") == _tensors(folder)


BY_LAYER = """
import sys
import jax
from panacea_jax.models import weights
from panacea_jax.models.model import load
from panacea_jax.parallel import make_mesh

mesh = make_mesh(2, 2, 2)
plain = load(sys.argv[1], mesh=mesh, dtype="float32").weights
weights.WHOLE, weights._apart, made = 0, lambda _: True, []
by_layer = weights._load_by_layer
weights._load_by_layer = lambda *a: made.append(a[0]) or by_layer(*a)
again = load(sys.argv[1], mesh=mesh, dtype="float32").weights
assert len(made) == len(jax.tree.leaves(plain["layers"])), made
for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again)):
    assert a.sharding == b.sharding and a.dtype == b.dtype and (a == b).all()
"""


def test_layer_by_layer_is_the_same(tmp_path):
    """The way to accelerators, on the CPU's memory."""
    folder = save(build("qwen2"), tmp_path / "m")
    env = os.environ | {"XLA_FLAGS": xla_flags(8)}
    done = subprocess.run(
        [sys.executable, "-c", BY_LAYER, str(folder)],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_on_a_cpu_the_host_buffer_is_the_array(tmp_path):
    """Which saves a copy; and a donated one is left alone."""
    ours = models.load(save(build("llama2"), tmp_path / "m"), dtype="float32")
    out = weights._empty([3, 5], np.dtype("float32"))
    assert out.ctypes.data % 64 == 0 and out.shape == (3, 5)
    kernel = ours.weights["layers"]["mlp"]["up_proj"]["kernel"]
    before = np.array(kernel)
    view = np.asarray(kernel)
    jax.jit(lambda x: x + 1, donate_argnums=0)(kernel).block_until_ready()
    np.testing.assert_array_equal(view, before)


def test_a_file_that_became_shorter(tmp_path):
    folder = save(build("llama2"), tmp_path / "m")
    file = folder / "model.safetensors"
    tensors = tensorfile.read_header(file)
    last = max(tensors.values(), key=lambda t: t.start)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 8)
    bounds = [(0, n) for n in last.shape]
    with pytest.raises(InputError, match=f"truncated: tensor {last.name} lacks 8 bytes"):
        list(last.blocks(bounds))
    file.unlink()
    with pytest.raises(InputError, match=f"tensor {last.name} cannot be read: No such file"):
        last.head(4)


@pytest.mark.parametrize("rows", [(0, 7), (2, 5), (3, 3)])
@pytest.mark.parametrize("columns", [(0, 11), (4, 9)])
def test_blocks_are_slices(tmp_path, monkeypatch, rows, columns):
    array = np.arange(77, dtype=np.float32).reshape(7, 11)
    entry = tensorfile.Entry("x", array.shape, array.dtype, lambda: array)
    tensorfile.write_tensors(tmp_path / "x.safetensors", [entry])
    tensor = tensorfile.read_header(tmp_path / "x.safetensors")["x"]
    monkeypatch.setattr(tensorfile, "BYTES_AT_A_TIME", 100)  # two rows of 44 bytes
    got = [np.zeros((0, columns[1] - columns[0]), np.float32), *tensor.blocks([rows, columns])]
    np.testing.assert_array_equal(np.concatenate(got), array[slice(*rows), slice(*columns)])
    assert max(map(len, got)) <= 5
    assert tensor.head(8) == array.tobytes()[:8] and tensor.head(1000) == array.tobytes()


@pytest.mark.parametrize("source_dtype", [np.float32, np.float64])
def test_copy_of_transposed_views(source_dtype):
    """Larger than a tile, either side transposed, with and without conversion."""
    source = np.random.default_rng(0).normal(size=(70, 130)).astype(source_dtype)
    for out, given in (
        (np.empty((70, 130), np.float32), source),
        (np.empty((130, 70), np.float32), source.T),
        (np.empty((130, 70), np.float32).T, source),
        (np.empty((70, 130), np.float32).T, source.T),
    ):
        tensorfile.copy(out, given)
        np.testing.assert_array_equal(out, given.astype(np.float32))
