"""Checkpoints that can be believed: checksums of arrays, damage of every kind, and what is gone on from then."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from panacea_jax.errors import InputError
from panacea_jax.train.checkpoints import (
    Checkpoints,
    PastCheckpoint,
    newest_checkpoint,
    read_checkpoint,
)
from panacea_jax.train.checksums import checksums
from panacea_jax.train.step import TrainState
from tests.on_devices import on_devices

STEPS = (2, 4, 6)


def state_at(step: int) -> TrainState:
    """Arrays that differ from step to step."""
    key = jax.random.key(step)
    params = {"a": jax.random.normal(key, (2, 3, 5)), "b": jax.random.normal(key, (7,)).astype(jnp.bfloat16)}
    return TrainState(params, (jnp.full((3,), step, jnp.int32),), {"epsilon": {"a": -params["a"]}}, jnp.int32(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3, run="ours")
    for step in STEPS:
        checkpoints.save(state_at(step), {"seed": step, "loss": 0.1})
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def largest(folder):
    """The largest file with data of arrays."""
    return max(folder.rglob("d/*"), key=lambda p: p.stat().st_size)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def restore(folder, **more):
    checkpoints = Checkpoints(folder, run="ours", **more)
    state, notes = checkpoints.restore(state_at(0))
    checkpoints.close()
    return state, notes


def assert_is(state, step):
    jax.tree.map(np.testing.assert_array_equal, state, state_at(step))


# ---------------------------------------------------------------- checksums


def words(array):
    """The 32-bit words of an array, in order, narrower elements one by one."""
    array = np.ascontiguousarray(array).reshape(-1)
    return array.view(f"u{min(4, array.itemsize)}").astype(np.uint64)


def by_hand(array):
    """The same sums with Python's numbers."""
    out = ""
    for seed in (0, 0x9E3779B9):
        total = 0
        for place, word in enumerate(words(array)):
            h = place ^ seed
            h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
            h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
            total += int(word) * ((h ^ h >> 16) | 1)
        out += f"{total % 2**32:08x}"
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "float64"])
def test_a_checksum_is_of_the_bits(dtype):
    draws = np.random.default_rng(0).normal(size=(3, 4, 5))
    array = (draws > 0 if dtype == "bool" else 50 + 9 * draws).astype(getattr(ml_dtypes, dtype, dtype))
    with jax.enable_x64(dtype == "float64"):
        assert checksums({"x": array, "y": jnp.asarray(array)}) == {"x": by_hand(array), "y": by_hand(array)}


def test_every_bit_and_every_place_counts():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    seen = {checksums({"x": array})["x"]}
    for bit in range(32):
        changed = array.copy()
        changed.reshape(-1).view(np.uint32)[bit % 24] ^= np.uint32(1 << bit)
        seen.add(checksums({"x": changed})["x"])
    seen.add(checksums({"x": array[::-1]})["x"])
    seen.add(checksums({"x": array[:, :, ::-1]})["x"])
    assert len(seen) == 35


def test_eight_devices_find_the_same():
    found = on_devices("tests.train.sharded_checksums")
    assert len(found) == 6 and set(found.values()) == {by_hand(np.arange(16 * 24, dtype=np.float32))}


# ---------------------------------------------------------------- damage


def test_nothing_is_said_of_a_sound_one(folder, caplog, capsys):
    state, notes = restore(folder)
    assert_is(state, 6)
    assert (notes["seed"], notes["loss"], caplog.text) == (6, 0.1, "")
    assert capsys.readouterr().err.count("\n") == 1  # resumed from


def without(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path):
    path.write_bytes(b"")


DAMAGE = {
    "an array's bits": lambda f: flip(largest(f / "state"), 8 * 600),
    "cut": lambda f: cut(largest(f / "state")),
    "emptied": lambda f: emptied(largest(f / "state")),
    "gone": lambda f: without(largest(f / "state")),
    "manifest": lambda f: flip(f / "state" / "manifest.ocdbt", 8 * 30),
    "names of arrays": lambda f: cut(f / "state" / "_METADATA"),
    "notes": lambda f: (f / "meta" / "metadata").write_text((f / "meta" / "metadata").read_text().replace('"seed": 6', '"seed": 7')),
    "no notes": lambda f: shutil.rmtree(f / "meta"),
    "no arrays": lambda f: shutil.rmtree(f / "state"),
    "only a name": lambda f: [shutil.rmtree(f), f.mkdir()],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_is_used(folder, kind, caplog, capsys):
    DAMAGE[kind](folder / "6")
    before = {p.name: p.stat().st_mtime_ns for p in (folder / "6").rglob("*")}
    state, notes = restore(folder)
    assert_is(state, 4)
    assert notes["seed"] == 4
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{folder / '6'}: damaged checkpoint (") and "\n" not in line
    assert capsys.readouterr().err.count("\n") == 1  # resumed from
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4", "6.damaged"]
    assert {p.name: p.stat().st_mtime_ns for p in (folder / "6.damaged").rglob("*")} == before, "kept as it is"


def test_the_run_goes_on_and_saves_that_step_again(folder):
    flip(largest(folder / "6" / "state"), 8 * 600)
    checkpoints = Checkpoints(folder, keep=2, run="ours")
    checkpoints.restore(state_at(0))
    checkpoints.save(state_at(6), {"seed": 6})
    checkpoints.close()
    assert sorted(p.name for p in folder.iterdir()) == ["4", "6", "6.damaged"]
    assert_is(restore(folder)[0], 6)


def test_several_damaged_ones(folder):
    for step in (4, 6):
        cut(largest(folder / str(step) / "state"))
    (folder / "6.damaged").mkdir()
    assert_is(restore(folder)[0], 2)
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4.damaged", "6.damaged", "6.damaged1"]


def test_stop(folder):
    cut(largest(folder / "6" / "state"))
    with pytest.raises(InputError, match=r"6: damaged checkpoint.*; remove that folder to go on from an older one"):
        restore(folder, on_damage="stop")
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4", "6"]
    shutil.rmtree(folder / "6")
    assert_is(restore(folder, on_damage="stop")[0], 4)


def test_none_is_left(folder):
    for step in STEPS:
        flip(largest(folder / str(step) / "state"), 8 * 600)
    with pytest.raises(InputError, match=r"6: damaged checkpoint.*, and none before it is better"):
        restore(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4", "6"]


def test_one_of_another_run(folder, tmp_path, caplog):
    other = Checkpoints(tmp_path / "other", run="theirs")
    other.save(state_at(8), {"seed": 8})
    other.close()
    shutil.copytree(tmp_path / "other" / "8", folder / "8")
    assert_is(restore(folder)[0], 6)
    assert "8: damaged checkpoint (it is of another run)" in caplog.text
    with pytest.raises(InputError, match="it is of another run"):
        read_checkpoint(tmp_path / "other" / "8", run="ours")
    assert read_checkpoint(tmp_path / "other" / "8")[1]["seed"] == 8


def test_of_other_shapes(folder):
    state = state_at(0)
    with pytest.raises(InputError, match="6: damaged checkpoint, or one of another run"):
        Checkpoints(folder).restore(state._replace(params=state.params | {"a": jnp.zeros((2, 2))}))


def test_from_before_there_were_checksums(folder):
    """They are restored as they were; a damaged name of a note does not make one of these."""
    path = folder / "6" / "meta" / "metadata"
    notes = json.loads(path.read_text())
    path.write_text(json.dumps({"seed": 1}))
    assert restore(folder)[1] == {"seed": 1}
    for name in ("sha256", "checksums", "run"):
        changed = {key.replace(name, name.upper()): value for key, value in notes.items()}
        path.write_text(json.dumps(changed))
        with pytest.raises(InputError, match="its notes differ from their hash"):
            read_checkpoint(folder / "6")


def test_a_checkpoint_on_the_host(folder):
    arrays, notes = read_checkpoint(newest_checkpoint(folder.parent))
    np.testing.assert_array_equal(arrays["params.a"], state_at(6).params["a"])
    np.testing.assert_array_equal(arrays["defence.epsilon.a"], -state_at(6).params["a"])
    assert notes["seed"] == 6
    flip(largest(folder / "6" / "state"), 8 * 600)
    with pytest.raises(InputError, match="6: damaged checkpoint"):
        read_checkpoint(folder / "6")
    with pytest.raises(InputError, match="not a checkpoint of ours"):
        read_checkpoint(folder / "3")


def test_a_damaged_one_is_told_of_once(folder, caplog):
    """Tasks that read its other arrays may fail later; asyncio says so with a traceback when they are collected."""
    (folder / "6" / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(InputError, match="6: damaged checkpoint"):
        read_checkpoint(folder / "6")
    caplog.clear()
    for text in ("Task exception was never retrieved\nfuture: <Task finished>", "another"):
        logging.getLogger("asyncio").error(text)
    assert [record.getMessage() for record in caplog.records] == ["another"]


def test_a_past_one_has_no_substitute(folder):
    assert_is(PastCheckpoint(folder, 4).restore(state_at(0))[0], 4)
    flip(largest(folder / "4" / "state"), 8 * 600)
    with pytest.raises(InputError, match="4: damaged checkpoint"):
        PastCheckpoint(folder, 4).restore(state_at(0))


def test_no_room_is_said_before_anything_is_written(folder, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    checkpoints = Checkpoints(folder)
    with pytest.raises(OSError, match=r"No space left on device: 0.0 MB are left"):
        checkpoints.save(state_at(8), {})
    checkpoints.close()
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4", "6"]
