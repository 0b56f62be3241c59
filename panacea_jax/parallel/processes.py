"""Several processes that run one program: joining, agreeing, one of them writing, and noticing who is missing.

The engine is ``jax.distributed``. Its coordination service, in process 0, also keeps a small store of keys; through it the processes
compare what they were started with, and give signs of life that do not depend on the collectives, which hang when somebody is gone.
"""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from panacea_jax.errors import InputError

# Seconds between two signs of life, and without one until a process counts as gone.
HEARTBEAT, SILENCE = 2.0, 20.0
# Seconds that process 0 stays to let the others read why it ends: the service ends with it, and jax then kills them without a word.
LAST_WORDS = 5 * HEARTBEAT
# Seconds without a finished step after which it is said who stands where; a compilation of a large model takes minutes.
STALLED = 300.0
# Seconds that processes wait for each other where all must pass, which is as long as it takes: the first may be judging with a model of
# its own in between, for hours, and when one of them is gone the guard ends the run.
PATIENCE = 7 * 86400.0

# Of the environment what changes programs or numbers.
SETTINGS = (
    "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_THREEFRY_PARTITIONABLE",
)  # fmt: skip
# Where a process is before its first meeting.
STARTING = "the start"

# Numbers that launchers set: tasks of SLURM and Open MPI, slices of TPUs (each perhaps of one machine).
LAUNCHED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")

T = TypeVar("T")


class Place(NamedTuple):
    """Where a process stands among the others; None is left to the launcher's environment."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None


def find_place(
    coordinator: str = "", num_processes: int | None = None, process_id: int | None = None
) -> Place | None:
    """Whether this process is one of several: by the flags, by ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``,
    or by what SLURM, Open MPI and GKE set for theirs. On TPU machines without such variables ``--coordinator=auto`` asks the cloud.

    Raises:
        InputError: half of it is said, or it does not make sense.
    """
    env = os.environ
    if coordinator == "auto":
        return Place(None, None, None)
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS", "")
    count = _number("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    index = _number("JAX_PROCESS_ID") if process_id is None else process_id
    if coordinator:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"--coordinator={coordinator}: HOST:PORT of process 0, or auto")
        if (count is None) != (index is None):
            raise InputError("--num_processes and --process_id: both or, with a launcher, neither")
        if count is not None and index is not None and not 0 <= index < count:
            raise InputError(f"--process_id={index}: one of 0 … {count - 1} (--num_processes)")
        return None if count == 1 else Place(coordinator, count, index)
    if count is not None or index is not None:
        raise InputError("--coordinator is not set: HOST:PORT of process 0")
    several = any((_number(name) or 1) > 1 for name in LAUNCHED)
    several |= any(
        "," in env.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
    )
    return Place(None, None, None) if several else None


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise InputError(f"{name}={text}: a number")
    return int(text)


def join(place: Place | None) -> None:
    """Join the others and start to watch them; before any computation.

    Raises:
        InputError: they cannot be reached. (When they do not come within 300 s, jax aborts the process itself.)
    """
    global _guard
    if place is None:
        return
    try:
        jax.distributed.initialize(
            place.coordinator, place.num_processes, place.process_id, _local_devices(),
            heartbeat_timeout_seconds=60,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        where = place.coordinator or "the launcher's environment"
        raise InputError(
            f"--coordinator: {where}: the processes did not meet ({str(error).splitlines()[0]})"
        ) from error
    _guard = _Guard()
    _guard.start()


def _local_devices() -> list[int] | None:
    """The empty list, to jax: every device that this process sees. None leaves it to jax, which reads ``JAX_LOCAL_DEVICE_IDS`` and
    otherwise gives each process that SLURM or Open MPI has started one GPU: right only where several of them share a machine."""
    env = os.environ
    # 1(x4) is one task on each of four nodes.
    several = not re.fullmatch(r"1(\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    several |= (_number("OMPI_COMM_WORLD_LOCAL_SIZE") or 1) > 1
    if several or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    return []


def joined() -> bool:
    """Whether this process is one of several."""
    return _guard is not None


def count() -> int:
    """Processes of this run."""
    return jax.process_count()


def first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return jax.process_index() == 0


def once(work: Callable[[], T]) -> T | None:
    """Let the first process do something, while the others wait until it is done; they get None."""
    result = work() if first() else None
    barrier()
    return result


def to_host(array: Any) -> np.ndarray:
    """The whole array in host memory. Where processes hold parts of it, all of them must ask."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


_barriers = 0


def barrier() -> None:
    """Wait until every process is here."""
    global _barriers
    if count() == 1:
        return
    _barriers += 1
    arrived(f"meeting {_barriers}")
    _client().wait_at_barrier(f"panacea/barrier/{_barriers}", int(1000 * PATIENCE))
    arrived(f"work after meeting {_barriers}")


_agreements = 0


def agree(where: Path | str, facts: Mapping[str, Any]) -> None:
    """Make sure that every process was started with the same; all wait for all.

    Args:
        where: what the error message begins with.
        facts: anything that JSON takes.

    Raises:
        InputError: in every process, if one differs from the first; says which, and in what.
    """
    global _agreements
    if count() == 1:
        return
    _agreements += 1
    folder = f"panacea/agree/{_agreements}/"
    _client().key_value_set(f"{folder}{jax.process_index()}", json.dumps(facts, sort_keys=True))
    barrier()
    said = {
        int(k.rpartition("/")[2]): json.loads(v) for k, v in _client().key_value_dir_get(folder)
    }
    for index in sorted(said):
        if change := first_change(said[0], said[index]):
            raise InputError(f"{where}: process {index} differs from process 0: {change}")


def first_change(old: Any, new: Any, prefix: str = "") -> str:
    """The first difference of two JSON values, ``"key.below: 1 there, 2 now"``, or ``""``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            below = f"{prefix}.{key}" if prefix else str(key)
            if change := first_change(old.get(key), new.get(key), below):
                return change
        return ""
    return "" if old == new else f"{prefix}: {old!r} there, {new!r} now"


_asked, _stopping = 0, False


def stop_asked() -> bool:
    """Whether one of the processes was told to stop (SIGTERM). All ask equally often, and hear of it at the same call.

    The calls are counted over the whole life of the process: jax agrees on one such number, once, which must still lie ahead.
    """
    global _asked, _stopping
    _asked += 1
    _stopping = bool(multihost_utils.reached_preemption_sync_point(_asked)) or _stopping
    return _stopping


def arrived(at: str) -> None:
    """Note where this process is, for the message of a run that hangs."""
    if _guard is not None:
        _guard.at = at


def leave(message: str = "", code: int = 1) -> None:
    """Tell the others that this process ends: well, or with a message, upon which they end too, with the same exit code."""
    if _guard is not None:
        _guard.leave(message, code)


def abandon(code: int) -> None:
    """End this process at once, if it is one of several: an ordinary exit would wait minutes for the others."""
    if joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for_verdict() -> None:
    """After a collective has failed: wait for the guard, which ends this process if somebody is gone."""
    if _guard is not None:
        time.sleep(SILENCE + 3 * HEARTBEAT + LAST_WORDS)


class _Guard(threading.Thread):
    """Gives signs of life and looks for those of the others; ends the process when one is gone."""

    def __init__(self) -> None:
        super().__init__(name="guard", daemon=True)
        self.at = STARTING
        self._index, self._beat, self._left = jax.process_index(), 0, False
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}
        self._moved, self._patience = (self.at, time.monotonic()), STALLED

    def run(self) -> None:
        """Until the process leaves."""
        while not self._left:
            try:
                self._say()
                said = _client().key_value_dir_get("panacea/alive/")
            except Exception as error:
                if not self._left:
                    logging.info("coordination service: %s", error)
                    self._end("process 0, which coordinates, does not answer")
                return
            self._look({int(k.rpartition("/")[2]): json.loads(v) for k, v in said})
            time.sleep(HEARTBEAT)

    def leave(self, message: str, code: int) -> None:
        self._left = True
        try:
            self._say(message or "done", code)
        except Exception:  # the coordinator is gone already
            return
        if message and self._index == 0:
            time.sleep(LAST_WORDS)

    def _say(self, end: str = "", code: int = 1) -> None:
        self._beat += 1
        sign = {
            "host": socket.gethostname(),
            "beat": self._beat,
            "at": self.at,
            "end": end,
            "code": code,
        }
        _client().key_value_set(
            f"panacea/alive/{self._index}", json.dumps(sign), allow_overwrite=True
        )

    def _look(self, said: Mapping[int, dict[str, Any]]) -> None:
        now = time.monotonic()
        for index in range(count()):
            sign = said.get(index, {"end": "", "host": "?", "at": STARTING, "code": 1})
            if index == self._index or sign["end"] == "done":
                continue
            if sign["end"]:
                self._end(f"process {index} ({sign['host']}) stopped: {sign['end']}", sign["code"])
            if index not in self._seen or self._seen[index][0] != sign:
                self._seen[index] = sign, now
            elif now - self._seen[index][1] > SILENCE:
                self._end(
                    f"process {index} ({sign['host']}) gives no sign of life since {SILENCE:.0f} s"
                )
        if self.at != self._moved[0]:
            self._moved, self._patience = (self.at, now), STALLED
        elif now - self._moved[1] > self._patience:
            where = ", ".join(f"{i} ({said[i]['host']}): {said[i]['at']}" for i in sorted(said))
            logging.warning(
                "nothing finished for %.0f s; processes are at %s", self._patience, where
            )
            self._patience *= 2  # a judge may take hours

    def _end(self, why: str, code: int = 1) -> None:
        print(
            f"panacea: {why}; process {self._index} stops too. Start all of them again with the same command to go on from the last "
            "checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        if self._index == 0:
            self.leave(why, code)
        os._exit(code)  # the main thread may hang in a collective


_guard: _Guard | None = None


def _client() -> Any:
    from jax._src import distributed  # there is no public way to the key-value store

    return distributed.global_state.client
