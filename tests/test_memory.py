"""What memory is left and was taken at most."""

import jax
import numpy as np
import pytest

from panacea_jax import memory


class Device:
    """A device as JAX shows it."""

    device_kind = "TPU v5e"

    def __init__(self, platform="tpu", **stats):
        self.platform, self._stats = platform, stats

    def memory_stats(self):
        return self._stats or None


def devices(monkeypatch, *found):
    monkeypatch.setattr(jax, "local_devices", lambda: list(found))


def test_the_mark_of_the_process_begins_anew():
    if not memory._RESET.exists():
        pytest.skip("no /proc")
    memory.forget_peak()
    before = memory.peak_bytes()[0]
    np.ones(2**25)  # 256 MiB, gone at once
    most, of = memory.peak_bytes()
    assert of == "process" and 200 * 2**20 < most - before < 400 * 2**20
    memory.forget_peak()
    assert memory.peak_bytes()[0] < most - 200 * 2**20


def test_devices_tell_their_own(monkeypatch):
    devices(monkeypatch, Device(bytes_limit=16, peak_bytes_in_use=3), Device(bytes_limit=16, peak_bytes_in_use=5))
    assert memory.peak_bytes() == (5, "device")
    assert memory.room_of_a_device() == (16, "of TPU v5e")
    devices(monkeypatch, Device())
    assert memory.room_of_a_device() is None


def test_devices_of_a_cpu_share_what_is_left_to_the_container(monkeypatch, tmp_path):
    files = {name: tmp_path / name for name in ("info", "most", "now")}
    files["info"].write_text("MemTotal:  9000 kB\nMemAvailable:    3000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", files["info"])
    monkeypatch.setattr(memory, "_GROUPS", ((files["most"], files["now"]),))
    devices(monkeypatch, Device("cpu"), Device("cpu"))
    assert memory.room_of_a_device() == (3000 * 1024 // 2, "of RAM that is free")
    files["most"].write_text("2048000\n")
    files["now"].write_text("1024000\n")
    assert memory.room_of_a_device() == (512000, "of RAM that is free")
    files["most"].write_text("max\n")
    assert memory.room_of_a_device() == (3000 * 1024 // 2, "of RAM that is free")
    files["info"].unlink()
    assert memory.room_of_a_device() is None
