"""Writing so that nothing is ever seen half-written: room is asked for first, and a name is taken when what has it is whole."""

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from panacea_jax.parallel import processes
from panacea_jax.stores import publish

# Folder beside a target in which its next version grows.
_NEXT = ".next"


def check_room(folder: Path, size: int) -> None:
    """Raises:
    OSError: the file system of ``folder``, which need not be there yet, has no room for ``size`` bytes; as if it were full already.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        reason = f"{os.strerror(errno.ENOSPC)}: {free / 1e6:,.1f} MB are left, {size / 1e6:,.1f} MB are needed"
        raise OSError(errno.ENOSPC, reason, str(folder))


def check_there(folder: Path) -> None:
    """Raises:
    OSError: a folder of ours is gone, as where a mount was lost: nothing may be written in its place.
    """
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write a folder to, which takes its place at the end of the block.

    What was there stays if the block does not end well, and what a killed process left is removed first. Of several processes, which must
    all enter, the first touches files; one at a time may be at work on a target, as the lock of a stage sees to.
    """
    place = target.parent / _NEXT
    processes.once(lambda: _emptied(place))
    new, old = place / target.name, place / f"{target.name}.old"
    try:
        yield new
    except BaseException:
        if processes.first():
            shutil.rmtree(place, ignore_errors=True)
        raise

    def swap() -> None:
        if target.exists():
            target.rename(old)
        new.rename(target)
        shutil.rmtree(place)
        publish(target)

    processes.once(swap)


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@contextlib.contextmanager
def growing(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target``, for whoever writes it to rename when it is whole; what is left of it goes at the end.

    Unlike with ``replacing``, several may be at work on one target, and none replaces another's. What a killed one left goes too: a folder
    that is not empty and whose lock nobody holds. Of several processes the first touches files.
    """
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    if not processes.first():
        yield new
        return
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with contextlib.suppress(OSError), _locked(left):
            if any(left.iterdir()):  # else somebody may have made it just now and is about to lock it
                shutil.rmtree(left)
    new.mkdir(parents=True)
    with contextlib.ExitStack() as held:
        held.callback(shutil.rmtree, new, ignore_errors=True)
        with contextlib.suppress(OSError):  # a file system without locks, where nothing is removed either
            held.enter_context(_locked(new))
        yield new


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises:
    OSError: somebody else holds its lock, or it has none.
    """
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Likewise for a file, by one process alone; its bytes are on the disk before it has its name."""
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield new
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(target)
        publish(target)
    finally:
        new.unlink(missing_ok=True)
