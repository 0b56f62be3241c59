"""Several processes that run one program: joining, agreeing, one of them writing, and noticing who is missing.

The engine is ``jax.distributed``. Its coordination service, in process 0, also keeps a small store of keys; through it the processes
compare what they were started with, and give signs of life (``lifeline``). What a process knows of the others is an object that the context
holds from ``joined`` on: alone, there is nobody to wait for.
"""

import contextlib
import contextvars
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from panacea_jax.errors import InputError
from panacea_jax.parallel.lifeline import HEARTBEAT, LAST_WORDS, MEETING, SILENCE, Lifeline, client
from panacea_jax.stores import refresh
from panacea_jax.waiting import waiting

# Seconds that processes wait for each other where all must pass, which is as long as it takes: the first may be judging with a model of
# its own in between, for hours, and when one of them is gone the guard ends the run.
PATIENCE = 7 * 86400.0
# Seconds that a process waits for all others to be started.
JOINING = 300

# Of the environment what changes programs or numbers.
SETTINGS = (
    "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_THREEFRY_PARTITIONABLE",
)  # fmt: skip
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


class _Alone:
    """The only process of its run."""

    def barrier(self) -> None:
        """Wait until every process is here."""

    def heard(self, word: Any) -> list[Any]:
        """What every process says."""
        return [word]

    def stop_asked(self) -> bool:
        """Whether one of the processes was told to stop."""
        return False

    def arrived(self, at: str) -> None:
        """Note where this process is."""

    def leave(self, message: str, code: int) -> None:
        """Tell the others that this process ends."""

    def abandon(self, code: int) -> None:
        """End this process at once."""

    def wait_for_verdict(self) -> None:
        """Wait for the lifeline."""


class _Together(_Alone):
    """One of several processes, once all have joined."""

    def __init__(self) -> None:
        self.lifeline = Lifeline()
        self._barriers = self._rounds = self._asked = 0
        self._stopping = False
        self.lifeline.start()

    def barrier(self) -> None:
        self._barriers += 1
        self.arrived(f"{MEETING} {self._barriers}")
        client().wait_at_barrier(f"panacea/barrier/{self._barriers}", int(1000 * PATIENCE))
        self.arrived(f"work after meeting {self._barriers}")

    def heard(self, word: Any) -> list[Any]:
        self._rounds += 1
        folder = f"panacea/heard/{self._rounds}/"
        client().key_value_set(f"{folder}{jax.process_index()}", json.dumps(word, sort_keys=True))
        self.barrier()
        said = {int(k.rpartition("/")[2]): json.loads(v) for k, v in client().key_value_dir_get(folder)}
        return [said[index] for index in sorted(said)]

    def stop_asked(self) -> bool:
        # Counted over the whole life of the process: jax agrees on one such number, once, which must still lie ahead.
        self._asked += 1
        reached = multihost_utils.reached_preemption_sync_point(self._asked)
        self._stopping = bool(reached) or self._stopping
        return self._stopping

    def arrived(self, at: str) -> None:
        self.lifeline.at = at

    def leave(self, message: str, code: int) -> None:
        self.lifeline.leave(message, code)

    def abandon(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def wait_for_verdict(self) -> None:
        time.sleep(SILENCE + 3 * HEARTBEAT + LAST_WORDS)


_ALONE = _Alone()
_group: contextvars.ContextVar[_Alone] = contextvars.ContextVar("processes", default=_ALONE)


@contextlib.contextmanager
def joined(place: Place | None) -> Iterator[None]:
    """Join the others and watch them, before any computation; what follows within the block is one of several processes.

    Raises:
        InputError: they cannot be reached. (When they do not come within ``JOINING`` seconds, jax aborts the process itself.)
    """
    if place is None:
        yield
        return
    try:
        where = f" at {place.coordinator}" if place.coordinator else ""
        with waiting(lambda: f"the other processes of this run{where}", JOINING):
            jax.distributed.initialize(
                place.coordinator, place.num_processes, place.process_id, _local_devices(),
                initialization_timeout=JOINING, heartbeat_timeout_seconds=60,
            )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        where = place.coordinator or "the launcher's environment"
        raise InputError(
            f"--coordinator: {where}: the processes did not meet ({str(error).splitlines()[0]})"
        ) from error
    token = _group.set(_Together())
    try:
        yield
    finally:
        _group.reset(token)


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


def together() -> bool:
    """Whether this process has joined others; asks no device."""
    return _group.get() is not _ALONE


def count() -> int:
    """Processes of this run."""
    return jax.process_count()


def first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return jax.process_index() == 0


def once(work: Callable[[], T]) -> T | None:
    """Let the first process do something, while the others wait until it is done; they get None, and see what it wrote."""
    result = work() if first() else None
    barrier()
    if refresh():  # of a work directory in a store each has a copy of its own
        barrier()
    return result


def to_host(array: Any) -> np.ndarray:
    """The whole array in host memory. Where processes hold parts of it, all of them must ask."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def barrier() -> None:
    """Wait until every process is here."""
    _group.get().barrier()


def agree(where: Path | str, facts: Mapping[str, Any]) -> None:
    """Make sure that every process was started with the same; all wait for all.

    Args:
        where: what the error message begins with.
        facts: anything that JSON takes.

    Raises:
        InputError: in every process, if one differs from the first; says which, and in what.
    """
    first, *others = heard(facts)
    for index, said in enumerate(others, start=1):
        if change := first_change(first, said):
            raise InputError(f"{where}: process {index} differs from process 0: {change}")


def heard(word: Any) -> list[Any]:
    """What every process says, in their order; all wait for all.

    Args:
        word: anything that JSON takes.
    """
    return _group.get().heard(word)


def from_first(word: T) -> T:
    """What the first process says, in every process; anything that JSON takes."""
    told: T = heard(word)[0]
    return told


def first_change(old: Any, new: Any, prefix: str = "") -> str:
    """The first difference of two JSON values, ``"key.below: 1 there, 2 now"``, or ``""``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            below = f"{prefix}.{key}" if prefix else str(key)
            if change := first_change(old.get(key), new.get(key), below):
                return change
        return ""
    return "" if old == new else f"{prefix}: {old!r} there, {new!r} now"


def stop_asked() -> bool:
    """Whether one of the processes was told to stop (SIGTERM). All ask equally often, and hear of it at the same call."""
    return _group.get().stop_asked()


def arrived(at: str) -> None:
    """Note where this process is, for the message of a run that hangs."""
    _group.get().arrived(at)


def leave(message: str = "", code: int = 1) -> None:
    """Tell the others that this process ends: well, or with a message, upon which they end too, with the same exit code."""
    _group.get().leave(message, code)


def abandon(code: int) -> None:
    """End this process at once, if it is one of several: an ordinary exit would wait minutes for the others."""
    _group.get().abandon(code)


def wait_for_verdict() -> None:
    """After a collective has failed: wait for the lifeline, which ends this process if somebody is gone."""
    _group.get().wait_for_verdict()
