"""How much memory this machine has left, and how much was taken at most: of its devices where they tell, else of the process."""

import resource
import sys
from pathlib import Path
from typing import Any

import jax

_RESET, _STATUS, _MEMINFO = Path("/proc/self/clear_refs"), Path("/proc/self/status"), Path("/proc/meminfo")
# Of a container, in either generation of control groups: what it may take, and has taken.
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def limit_of(device: Any) -> int | None:
    """Bytes that JAX may use on a device of this process; None where the back-end does not say (CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit")


def room_of_a_device() -> tuple[int, str] | None:
    """Bytes that a device of this process may hold, and what they are of; None where nobody tells.

    Accelerators tell their limit. The CPU's devices share what the machine, or the container, has left now.
    """
    devices = jax.local_devices()
    if limit := limit_of(devices[0]):
        return limit, f"of {devices[0].device_kind}"
    if devices[0].platform != "cpu" or (left := _left()) is None:
        return None
    return left // len(devices), "of RAM that is free"


def peak_bytes() -> tuple[int, str]:
    """The most that was taken at a time since ``forget_peak``, and by what: a device (since the process began), else the process."""
    stats = [s for d in jax.local_devices() if (s := d.memory_stats())]
    if peaks := [int(s["peak_bytes_in_use"]) for s in stats if s.get("peak_bytes_in_use")]:
        return max(peaks), "device"
    if (kilobytes := _number(_STATUS, "VmHWM:")) is not None:
        return 1024 * kilobytes, "process"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most, "process"


def forget_peak() -> None:
    """Let the process's mark begin anew; where the system cannot, it goes on since the process began."""
    try:
        _RESET.write_text("5")
    except OSError:
        return


def _left() -> int | None:
    """Bytes of RAM that may still be taken."""
    kilobytes = _number(_MEMINFO, "MemAvailable:")
    found = [] if kilobytes is None else [1024 * kilobytes]
    for limit, taken in _GROUPS:
        most, now = _number(limit), _number(taken)
        if most is not None and now is not None:
            found.append(max(0, most - now))
    return min(found, default=None)


def _number(path: Path, key: str = "") -> int | None:
    """The number in a file of the system, or behind a key of it; None where there is none."""
    try:
        words = path.read_text().split()
        return int(words[words.index(key) + 1 if key else 0])
    except (OSError, ValueError, IndexError):
        return None
