"""Who is at work in a work directory in a store: one process, for as long as it gives signs of life.

Claims are numbered objects, and a number is given once: the store creates an object only where none is (``If-None-Match`` on S3,
``ifGenerationMatch=0`` on GCS), so of all that ask for the next number one gets it. The highest number holds the folder. Its owner writes
a new sign of life into it now and then, and that it is free at the end; who asks meanwhile waits until either is so, or until no sign
has come for a minute. An owner that was thought dead and was not finds a higher number than its own, and writes nothing any more.
"""

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from panacea_jax.errors import InputError, StoreFailed
from panacea_jax.stores.objects import Objects
from panacea_jax.untrusted import parse_json

PREFIX = ".claim."
# Seconds between signs of life, without one until its owner counts as dead, and that a process waits in all.
BEAT, SILENCE, PATIENCE = 10.0, 60.0, 100.0

_log = logging.getLogger(__name__)


class Claim:
    """The right to write below an address, from the beginning until ``close``."""

    def __init__(self, objects: Objects) -> None:
        """Wait for it.

        Raises:
            InputError: another run is at work there, and did not end in ``PATIENCE`` seconds; or nothing can be written there.
        """
        self._objects, self._ended, self._beats = objects, threading.Event(), 0
        try:
            self._number = self._wait()
        except StoreFailed as error:
            raise InputError(str(error)) from error
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    def _wait(self) -> int:
        where, begin, told = self._objects.address, time.monotonic(), False
        seen, since = (-1, b""), begin
        while True:
            number = max(self._objects.numbers(PREFIX), default=0)
            found = number, self._objects.read(f"{PREFIX}{number}") or b""
            now = time.monotonic()
            if found != seen:
                seen, since = found, now
            owner = _owner(found[1])
            if owner.get("free", True) or _died_here(owner) or now - since >= SILENCE:
                if self._objects.create(f"{PREFIX}{number + 1}", self._sign()):
                    if number:
                        self._objects.delete([f"{PREFIX}{number}"])
                    return number + 1
                continue
            if now - begin >= PATIENCE:
                raise InputError(f"{where}: another run is at work there; wait for its end")
            if not told:
                told = True
                _log.warning("%s: another run is at work there, or was killed; waiting for it, up to %.0f s", where, PATIENCE)
            time.sleep(min(1.0, PATIENCE))

    def _sign(self, free: bool = False) -> bytes:
        self._beats += 1
        return json.dumps({"machine": _machine(), "process": os.getpid(), "beat": self._beats, "free": free}).encode()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                self.check()
                self._objects.write(f"{PREFIX}{self._number}", self._sign())
            except StoreFailed as error:  # who writes next is told
                _log.warning("%s", error)

    def check(self) -> None:
        """Make sure that the right is still ours.

        Raises:
            StoreFailed: it is not, or the store does not say.
        """
        try:
            newest = max(self._objects.numbers(PREFIX), default=0)  # that after ours is gone again once a third one came
        except InputError as error:
            raise StoreFailed(str(error)) from error
        if newest > self._number:
            raise StoreFailed(f"{self._objects.address}: another run took over, since this one gave no sign of life for {SILENCE:.0f} s")

    def close(self) -> None:
        """Let others in."""
        self._ended.set()
        self._thread.join()
        self._objects.write(f"{PREFIX}{self._number}", self._sign(free=True))


def _owner(data: bytes | None) -> dict[str, Any]:
    """What a claim says; nothing of one that is gone, for the next is there, or is not ours."""
    try:
        found = parse_json(data or b"{}", "claim")
    except InputError:
        return {"free": False}
    return found if isinstance(found, dict) else {"free": False}


def _died_here(owner: dict[str, Any]) -> bool:
    """Whether a claim's owner was a process of this machine and is no more; of other machines nobody can tell."""
    if owner.get("machine") != _machine() or not isinstance(owner.get("process"), int):
        return False
    return not Path(f"/proc/{owner['process']}").exists()


def _machine() -> str:
    """This boot of this machine, or of this container; "" where it does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.uname().nodename}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
