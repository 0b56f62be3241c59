"""The exceptions that mean "the user can fix this" and "the model did not pass", and the errors of others: a full disk, and what no
message may show."""

import errno
import hashlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path


class InputError(Exception):
    """Bad input: a key, a file or a tensor that the user has to change.

    The message is one line that names the culprit; the command line prints it and exits with code 2.
    Anything else that escapes is a defect of ours and keeps its traceback.

    Attributes:
        record: what a user's record says at that place, which the message names by a hash alone; None where no record is to blame.
    """

    def __init__(self, message: str, *, record: object = None) -> None:
        message = " ".join(message.split())
        self.record = record if record is None or isinstance(record, str) else repr(record)
        if self.record is not None:
            digest = hashlib.sha256(self.record.encode("utf-8", "backslashreplace")).hexdigest()[:12]
            message += f" (text {digest}; --show_records shows it)"
        super().__init__(message)


def record_text(error: BaseException) -> str | None:
    """What a record says that an error, or one that it came from, is about; None where none is."""
    return next((one.record for one in _chain(error) if isinstance(one, InputError) and one.record is not None), None)


class StoreFailed(Exception):
    """An object store that does not take what is to be written, after all retries; the command line prints the line and ends with 1."""


class GateNotMet(Exception):
    """A model that was measured and found wanting; the command line ends with 3."""


class OutOfMemory(Exception):
    """A device, or this machine, had not enough memory; the message says what needs less. The command line ends with 1."""


# How a full disk, a used-up quota, or a file beyond a process's limit is said by the system and by libraries that write files themselves.
_FULL = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
# How a folder that is gone, or closed to us, is said; the latter ones only by a file system that went away, whatever the file.
_CLOSED = {number: os.strerror(number) for number in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM)}
_GONE = {number: os.strerror(number) for number in (errno.EROFS, errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EHOSTDOWN)}
# The words of tensorstore for two of them, and of orbax for a folder that went while it was saving.
_WORDS = {errno.ENOENT: ("NOT_FOUND:", "No ArrayMetadata found"), errno.EACCES: ("PERMISSION_DENIED:",)}
# How XLA's back-ends, NumPy and Python say how much memory they asked for.
_ASKED = re.compile(
    r"(?:allocate|allocating|reserve|request for|Used|temporaries)\s*\(?([\d.]+)\s*([KMGTP]?)(?:i?B)?\b", re.IGNORECASE
)
_COMPILING = re.compile(r"CompileTime|memory space|compile permanent error|while compiling", re.IGNORECASE)
_PATH = re.compile(r"(?<=[\"'])/[^\"']+(?=[\"'])|(?<=directory: )/\S+(?=\. )")
# Names of environment variables that hold what no log may show, and a password in an address.
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")
_LOGIN = re.compile(r"//[^/@\s]+@")


def no_space(error: BaseException) -> tuple[str, str] | None:
    """``(file, reason)`` if an error, or one that it came from, says that no room is left to write; the file is "" where none is named."""
    for one in _chain(error):
        text = str(one)
        for number, reason in _FULL.items():
            if (isinstance(one, OSError) and one.errno == number) or reason in text:
                named = getattr(one, "filename", None) or next(iter(_PATH.findall(text)), "")
                return str(named), (isinstance(one, OSError) and one.strerror) or reason
    return None


def out_of_reach(error: BaseException, folders: Collection[str]) -> tuple[str, str] | None:
    """``(file, reason)`` if an error, or one that it came from, says that a file in one of the user's ``folders`` is gone or closed to
    us, or that a file system went away."""
    roots = tuple(os.path.abspath(folder) for folder in folders)
    for one in _chain(error):
        text = str(one)
        for number, reason in (_CLOSED | _GONE).items():
            if (isinstance(one, OSError) and one.errno == number) or reason in text or text.startswith(_WORDS.get(number, ())):
                named = os.fsdecode(getattr(one, "filename", None) or next(iter(_PATH.findall(text)), ""))
                within = named and any(Path(os.path.abspath(named)).is_relative_to(root) for root in roots)
                if within or (number in _GONE and isinstance(one, OSError)):
                    return named, reason
    return None


def out_of_memory(error: BaseException) -> str | None:
    """What was done and how much was asked for, ``"running: 12.30 GiB were asked for"``, if an error, or one that it came from, says that
    there was not enough memory; None for any other."""
    for one in _chain(error):
        text = str(one)
        exhausted = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
        if not isinstance(one, MemoryError) and not (isinstance(one, RuntimeError) and exhausted):
            continue
        what = "compiling" if _COMPILING.search(text) else "running"
        if not (found := _ASKED.search(text)):
            return what
        return f"{what}: {float(found[1]) * 1024.0 ** ' KMGTP'.index(found[2].upper() or ' ') / 2**30:.2f} GiB were asked for"
    return None


def without_secrets(text: str) -> str:
    """A message of somebody else's library without the keys and passwords that the environment holds, or an address in it."""
    for name, value in os.environ.items():
        if _SECRET.search(name.upper()) and len(value) >= 8:
            text = text.replace(value, "…")
    return _LOGIN.sub("//…@", text)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it came from."""
    left, seen = [error], set()
    while left:
        one = left.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        left += [e for e in (one.__cause__, one.__context__) if e is not None]
        if isinstance(one, BaseExceptionGroup):
            left += one.exceptions
