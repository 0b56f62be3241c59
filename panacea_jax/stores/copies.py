"""Local folders that stand for folders in object stores: what is read is fetched, a work directory is worked in here and published.

Everything else sees local paths. A stand-in to read holds what the store held when the command first asked. A working copy begins as
that, too; what is written there goes up at the points at which it would survive a kill on a local disk: a file that got its name, a
checkpoint that is saved, a stage that is done. The store is the truth: what a killed process had not published is done again.
"""

import contextlib
import contextvars
import fcntl
import fnmatch
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple

from panacea_jax.errors import InputError
from panacea_jax.stores.addresses import address_of, cache_place, is_address, stand_in_of
from panacea_jax.stores.claims import PREFIX, Claim
from panacea_jax.stores.objects import Objects, Stored
from panacea_jax.untrusted import read_json_value

# Seconds between two publications of a file that grows line by line, like answers.
GROWING = 20.0
# Files that say that all beside them is there go up last, and are deleted first; a checkpoint without its own was cut short by a kill.
_CHECKPOINT = "_CHECKPOINT_METADATA"
_LAST = (("config.json", "adapter_config.json", _CHECKPOINT), ("manifest.json",))
# Names of what is not whole, or of this machine alone.
_PASSING = (".*", "*.orbax-checkpoint-tmp*")


class _File(NamedTuple):
    """What tells one state of a local file from another."""

    size: int
    changed: int
    number: int


class _Session(NamedTuple):
    """What a command has of stores: working copies by address, and what it has fetched."""

    copies: dict[str, "WorkingCopy"]
    fetched: set[tuple[str, tuple[str, ...]]]


_session: contextvars.ContextVar[_Session | None] = contextvars.ContextVar("session", default=None)


@contextlib.contextmanager
def session() -> Iterator[None]:
    """The block of one command: at its end, be it good or bad, its working copies are published and free for others."""
    mine = _Session({}, set())
    token = _session.set(mine)
    try:
        yield
    finally:
        _session.reset(token)
        with contextlib.ExitStack() as stack:
            for copy in mine.copies.values():
                stack.callback(copy.close)


def working_copy(where: str | PurePath, process: int = 0) -> Path:
    """The folder to write in for a folder: of an address a copy that is published, ours until the session ends; else the very path.

    Args:
        where: path or address.
        process: of several that run together the number of this one; all but the first follow what that publishes.

    Raises:
        InputError: the store cannot be used, or another run is at work there.
    """
    if not is_address(where):
        return Path(where)
    address, mine = address_of(where), _session.get()
    if mine is None:
        raise RuntimeError("a working copy outside of a session")
    if address not in mine.copies:
        mine.copies[address] = WorkingCopy(address, process)
    return mine.copies[address].folder


def stand_in(where: str | PurePath, patterns: Sequence[str] = ("*",)) -> Path:
    """The local file or folder to read for a path: of an address what was fetched from there, else the very path.

    Args:
        where: path or address; what is below a working copy is found there.
        patterns: of the names that are needed.

    Raises:
        InputError: the store cannot be read. That nothing is there is left to the caller to see.
    """
    if not is_address(where):
        return Path(where)
    address, mine = address_of(where), _session.get()
    for copy in mine.copies.values() if mine else ():
        if f"{address}/".startswith(f"{copy.address}/"):
            return copy.folder / address[len(copy.address) :].lstrip("/")
    asked = address, tuple(patterns)
    path = stand_in_of(address, "read")
    if mine is None or asked not in mine.fetched:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (cache_place(address, "read") / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one fetches
            _Mirror(Objects(address), path, cache_place(address, "read")).pull(patterns)
    if mine is not None:
        mine.fetched.add(asked)
    return path


def publish(path: Path, *, growing: bool = False) -> None:
    """Make the store hold what a file or folder of a working copy holds; nothing for any other path.

    Args:
        path: in the working copy.
        growing: it grows by small pieces, so that it is enough to do it every ``GROWING`` seconds.

    Raises:
        StoreFailed: it cannot be written there.
    """
    mine = _session.get()
    for copy in mine.copies.values() if mine else ():
        if path.is_relative_to(copy.folder):
            copy.publish(path, growing=growing)


def published(path: Path) -> bool:
    """Whether a path is of a working copy, and not written to the store by itself."""
    mine = _session.get()
    return any(path.is_relative_to(copy.folder) and copy.apart != path.name for copy in mine.copies.values()) if mine else False


def refresh() -> bool:
    """Let a process that follows find what the first one has published; whether there are working copies at all."""
    mine = _session.get()
    for copy in mine.copies.values() if mine else ():
        copy.refresh()
    return bool(mine and mine.copies)


def direct(path: Path) -> Any:
    """Where orbax is to find a path: on GCS, to which it writes arrays itself, from all processes of a run, its address; else the path."""
    mine = _session.get()
    for copy in mine.copies.values() if mine else ():
        if copy.apart and path.is_relative_to(copy.folder):
            from etils import epath

            return epath.Path(copy.address) / path.relative_to(copy.folder)
    return path.resolve()


class _Mirror:
    """A folder, or one file, here and in a store, with a note of what both held when they were last made equal."""

    def __init__(self, objects: Objects, path: Path, place: Path, apart: str = "") -> None:
        """``apart`` is a name of folders that are let be."""
        self.objects, self.path, self._note, self._apart = objects, path, place / "index.json", apart
        self.known: dict[str, tuple[Stored, _File]] = {}
        with contextlib.suppress(InputError, TypeError, ValueError, AttributeError):
            held = read_json_value(self._note) if self._note.is_file() else {}
            self.known = {name: (Stored(*there), _File(*here)) for name, (there, here) in held.items()}

    def pull(self, patterns: Sequence[str] = ("*",)) -> None:
        """Make the folder hold what the store holds, of the names that match; what is equal already is left."""
        there = {
            name: stored for name, stored in _whole(self.objects.listed()).items()
            if not PurePosixPath(name).name.startswith(PREFIX) and self._apart not in name.split("/")[:-1]
        }  # fmt: skip
        here = self.files(self.path)
        for name in here.keys() - there.keys():
            self.local(name).unlink()
        _remove_empty(self.path)
        wanted = {name for name in there if any(fnmatch.fnmatch(PurePosixPath(name).name, pattern) for pattern in patterns)}
        equal = {name for name, stored in there.items() if name in here and self.known.get(name) == (stored, here[name])}
        self.objects.fetch({name: self.local(name) for name in sorted(wanted - equal)})
        self.note({name: (there[name], _state(self.local(name))) for name in wanted | equal})

    def local(self, name: str) -> Path:
        """Where a name of the store is here."""
        return self.path / name if name else self.path

    def files(self, path: Path) -> dict[str, _File]:
        """Every file at or below a path, by its name in the store."""
        found = [path] if path.is_file() else [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
        return {"" if file == self.path else file.relative_to(self.path).as_posix(): _state(file) for file in found}

    def note(self, known: Mapping[str, tuple[Stored, _File]]) -> None:
        self.known = dict(known)
        self._note.parent.mkdir(parents=True, exist_ok=True)
        new = self._note.with_name(f".index.{os.getpid()}")
        new.write_text(json.dumps(self.known))
        new.replace(self._note)


class WorkingCopy:
    """A work directory in a store, and the folder here that stands for it."""

    def __init__(self, address: str, process: int = 0) -> None:
        """Claim it, and fetch what is there.

        Args:
            address: in its one form.
            process: see ``working_copy``; one that follows has no claim.

        Raises:
            InputError: see ``working_copy``.
        """
        kind = f"work{process or ''}"
        self.address, self.folder = address, stand_in_of(address, kind)
        self.apart = "checkpoints" if address.startswith("gs:") else ""
        self._objects = Objects(address)
        self._published: dict[Path, float] = {}
        self._claim = None if process else Claim(self._objects)
        with contextlib.ExitStack() as undo:
            if self._claim is not None:
                undo.callback(self._claim.close)
            self._mirror = _Mirror(self._objects, self.folder, cache_place(address, kind), self.apart)
            self._mirror.pull()
            self.folder.mkdir(parents=True, exist_ok=True)
            undo.pop_all()

    def publish(self, path: Path, *, growing: bool = False) -> None:
        """See the function of that name."""
        if self._claim is None:
            return
        now = time.monotonic()
        if growing and now - self._published.get(path, -GROWING) < GROWING:
            return
        name = path.relative_to(self.folder).as_posix()
        if _passing(name):
            return
        known = self._mirror.known
        here = {n: state for n, state in self._mirror.files(path).items() if not _passing(n)}
        changed = [n for n, state in here.items() if n not in known or known[n][1] != state]
        gone = [n for n in known if n not in here and not _passing(n) and (name in (".", n) or n.startswith(f"{name}/"))]
        if changed or gone:
            self._claim.check()
        for rank in range(len(_LAST) + 1):
            if files := {n: self.folder / n for n in changed if _rank(n) == rank}:
                stored = self._objects.put(files)
                self._mirror.note(known | {n: (s, here[n]) for n, s in stored.items()})
                known = self._mirror.known
        for rank in reversed(range(len(_LAST) + 1)):
            if names := [n for n in gone if _rank(n) == rank]:
                self._objects.delete(names)
        if gone:
            self._mirror.note({n: k for n, k in known.items() if n not in gone})
        self._published[path] = now

    def refresh(self) -> None:
        """See the function of that name."""
        if self._claim is None:
            self._mirror.pull()

    def close(self) -> None:
        """Publish what is left, and let others in."""
        if self._claim is not None:
            with contextlib.closing(self._claim):
                self.publish(self.folder)


def _state(file: Path) -> _File:
    told = file.stat()
    return _File(told.st_size, told.st_mtime_ns, told.st_ino)


def _rank(name: str) -> int:
    base = PurePosixPath(name).name
    return next((rank for rank, names in enumerate(_LAST, start=1) if base in names), 0)


def _passing(name: str) -> bool:
    return name != "." and any(fnmatch.fnmatch(part, pattern) for part in name.split("/") for pattern in _PASSING)


def _remove_empty(folder: Path) -> None:
    for below, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(below)


def _whole(listed: Mapping[str, Stored]) -> dict[str, Stored]:
    """Objects without those of checkpoints that were being put up, or deleted, when their process was killed."""

    def checkpoint(name: str) -> str:
        parts = name.split("/")
        at = parts.index("checkpoints") + 1 if "checkpoints" in parts else len(parts)
        return "/".join(parts[: at + 1]) if at < len(parts) - 1 and parts[at].isdecimal() else ""

    found = {name: checkpoint(name) for name in listed}
    return {name: listed[name] for name, folder in found.items() if not folder or f"{folder}/{_CHECKPOINT}" in listed}
