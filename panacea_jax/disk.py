"""Writing so that nothing is ever seen half-written: room is asked for first, and a name is taken when what has it is whole."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from panacea_jax.parallel import processes

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

    processes.once(swap)


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@contextlib.contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Likewise for a file, by one process alone; its bytes are on the disk before it has its name."""
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield new
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
