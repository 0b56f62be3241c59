"""The work directory: one folder a stage, each with a manifest that says what made it.

A stage that is done is skipped; one that was cut short goes on; a folder that some other configuration, or somebody else, made, or in
which another run is at work, is refused and left as it is.
"""

import contextlib
import datetime
import fcntl
import functools
import importlib.metadata
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import jax
from absl import logging
from ml_collections import ConfigDict

from panacea_jax.disk import replacing_file
from panacea_jax.errors import InputError
from panacea_jax.parallel import processes
from panacea_jax.stores import by_address, publish, stand_in
from panacea_jax.sums import difference, sha256_folder, sha256_json, sums_of
from panacea_jax.untrusted import parsing, read_json_value
from panacea_jax.waiting import waiting

MANIFEST, LOCK = "manifest.json", ".lock"
# Seconds to wait for a run that is just ending, or whose machine was lost: a server of files keeps its locks for a while.
LOCK_PATIENCE = 100.0
# Seconds until a process must see what another one wrote: clients of NFS remember for a while that a file was not there.
VISIBLE = 60.0
PACKAGES = (
    "panacea_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "datasets",
)


class StageFolder:
    """One stage's folder: checked when opened, made and marked when work in it begins.

    Nothing is written in between, so that bad input found there (a source, a tensor) leaves no folder behind that the corrected
    command would then be refused for. Used with ``with``: at the end of the block others may work there, whether the stage was finished
    or not; what a next try goes on from stays.

    Attributes:
        folder: ``WORKDIR/<stage>``.
        done: the stage was finished earlier, by the same configuration.
    """

    def __init__(
        self, workdir: Path, name: str, config: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> None:
        """Look at the folder; ``begin`` makes it.

        Args:
            workdir: the work directory.
            name: stage.
            config: the part of the resolved configuration that decides the outcome.
            inputs: sha256 by input (source spec or folder).

        Raises:
            InputError: the folder cannot be written, is not ours, or was made by another configuration or from other inputs; or the
                processes of this run disagree about any of it.
        """
        self.name, self.folder = name, workdir / name
        self._path = self.folder / MANIFEST
        self._config, self._inputs = plain(config), dict(inputs)
        self._lock: IO[Any] | None = None
        self.done = self._look(workdir)
        if processes.count() > 1:  # alone there is nothing to hash our code for
            processes.agree(
                self.folder,
                {"config": self._config, "inputs": self._inputs, "versions": versions(), "code": _code(), "done": self.done},
            )  # fmt: skip

    def __enter__(self) -> "StageFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _look(self, workdir: Path) -> bool:
        """Whether the stage is done; that it can be written, if it is not there."""
        # unlike Path.exists, False where a folder above is closed to us
        if os.path.exists(self._path):
            manifest = read_manifest(self.folder)
            done = self._compare(manifest)
            if done and (wrong := difference(self.folder, manifest.get("files", {}))):
                raise InputError(f"{self.folder}: not as it was made ({wrong}); put that right, or remove the folder to make it again")
            return done
        # a kill before there was a manifest may leave the lock, and the file that was to become one
        if os.path.isdir(self.folder) and any(not p.name.startswith((LOCK, f".{MANIFEST}.")) for p in self.folder.iterdir()):
            raise InputError(
                f"{self.folder}: not empty and without a {MANIFEST}: not ours, left alone"
            )
        nearest = next(
            p for p in (self.folder, *self.folder.absolute().parents) if os.path.exists(p)
        )
        if not os.path.isdir(nearest):
            raise InputError(f"--workdir={workdir}: cannot be written ({nearest} is not a folder)")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise InputError(f"--workdir={workdir}: cannot be written (no permission in {nearest})")
        return False

    def begin(self) -> None:
        """Make the folder and note in it what is being made, unless that was done by an earlier try. It is ours until the stage is
        finished or the block ends.

        Raises:
            InputError: the folder cannot be written, another run is at work in it or was since we looked, or not every process sees it.
        """
        processes.once(self._begin)
        if not self._path.exists():
            self._wait_to_see_it()
        if not self._path.exists():
            raise InputError(
                f"--workdir={self.folder.parent}: process {jax.process_index()} does not see what process 0 writes; all need one "
                "shared folder"
            )

    def _wait_to_see_it(self) -> None:
        end = time.monotonic() + VISIBLE
        with waiting(lambda: f"{self._path}, which process 0 has written, to be seen", VISIBLE):
            while not self._path.exists() and time.monotonic() < end:
                with contextlib.suppress(OSError):
                    os.listdir(self.folder.parent)  # makes such a client look again
                time.sleep(0.5)

    def _begin(self) -> None:
        try:
            if self._lock is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = _claim(self.folder)
            if not self._path.exists():
                self._write("running", {})
        except OSError as error:
            raise InputError(
                f"--workdir={self.folder.parent}: cannot be written ({error.strerror})"
            ) from error
        # Between the look and this lie minutes of loading, in which another run may have been here.
        if self._compare(read_manifest(self.folder)) and not self.done:
            raise InputError(
                f"{self.folder}: another run finished it meanwhile; start this one again to go on"
            )

    def _compare(self, manifest: Mapping[str, Any]) -> bool:
        for what, old, new in (
            ("config", manifest["config"], self._config),
            ("input", manifest["inputs"], self._inputs),
        ):
            changed = processes.first_change(old, new)
            if changed:
                raise InputError(
                    f"{self.folder}: made by another run ({what} {changed}); choose another --workdir"
                )
        return bool(manifest["status"] == "done")

    def finish(self, outcome: Mapping[str, Any], status: str = "done") -> None:
        """Mark the stage as done, with what is worth keeping of its outcome; with another status it is noted, but not done."""
        processes.once(lambda: self._finish(status, outcome))
        self._release()
        self.done = status == "done"

    def _finish(self, status: str, outcome: Mapping[str, Any]) -> None:
        publish(self.folder)  # before the manifest, which says that all is there
        self._write(status, outcome)

    def _release(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):  # an empty file that stays does no harm
                (self.folder / LOCK).unlink()
            self._lock.close()
            self._lock = None

    def _write(self, status: str, outcome: Mapping[str, Any]) -> None:
        manifest = {
            "stage": self.name,
            "status": status,
            "config": self._config,
            "config_sha256": sha256_json(self._config),
            "inputs": self._inputs,
            "date": first_day(self.folder.parent) or datetime.date.today().isoformat(),
            "versions": versions(),
            "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
            "processes": jax.process_count(),
            "outcome": plain(outcome),
            "made_by": _makers(self._inputs),
            "files": {} if status == "running" else sums_of(self.folder, MANIFEST),
        }
        manifest["sha256"] = sha256_json(manifest)
        write_text(self._path, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _claim(folder: Path) -> IO[Any]:
    """The folder's lock file, held, with who holds it."""
    path = folder / LOCK
    while True:
        file = path.open("ab")
        lock(file, folder)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")  # for people; nothing is decided by it
            holder = {"host": os.uname().nodename, "pid": os.getpid(), "since": now}
            file.truncate(0)
            file.write(json.dumps(holder).encode())
            file.flush()
            return file
        file.close()  # who held it has finished meanwhile, and removed it


def lock(file: IO[Any], what: Path) -> None:
    """Keep other runs out while ``file`` is open; the system lets go when a process dies. Does nothing where it has no locks.

    Raises:
        InputError: another run holds it, and did not let go in ``LOCK_PATIENCE`` seconds.
    """
    if try_lock(file, what):
        return
    end = time.monotonic() + LOCK_PATIENCE
    with waiting(lambda: f"the run that is at work in {what}{_holder(what)}", LOCK_PATIENCE):
        while not try_lock(file, what):
            if time.monotonic() >= end:
                file.close()
                raise InputError(f"{what}: another run is at work there{_holder(what)}; wait for its end")
            time.sleep(min(0.1, LOCK_PATIENCE))


def _holder(folder: Path) -> str:
    """Who holds the lock of a folder, as it noted itself; "" where nobody did."""
    try:
        note = read_json_value(folder / LOCK, "no note of ours")
        return f" ({note['host']}, process {note['pid']}, since {note['since']})"
    except (InputError, LookupError, TypeError):
        return ""


def try_lock(file: IO[Any], what: Path) -> bool:
    """Likewise, without waiting: whether no other run holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        logging.warning(
            "%s: its file system has no locks; let one run at a time write there", what
        )
    return True


def _makers(inputs: Mapping[str, str]) -> dict[str, str]:
    """Of each input that a stage left, the hash of that stage's manifest, which names the hashes of its own: the link of a chain."""
    manifests = {name: made.get("sha256", "") for name in inputs if (made := _manifest_of(stand_in(name)))}
    return {name: digest for name, digest in manifests.items() if digest}


def _manifest_of(left: Path) -> dict[str, Any]:
    """The manifest of the stage that left a folder, e.g. ``STAGE/adapter``; empty where none of ours tells."""
    with contextlib.suppress(InputError):
        return read_manifest(left.parent)
    return {}


def check_as_made(left: Path) -> None:
    """Make sure that what a stage left, ``STAGE/adapter`` or a file ``STAGE/set.jsonl``, is still that, before anything is made of it;
    nothing where no manifest tells.

    Raises:
        InputError: a file of it differs or is missing.
    """
    files = _manifest_of(left).get("files", {})
    own = {name: digest for name, digest in files.items() if f"{name}/".startswith(f"{left.name}/")}
    if wrong := difference(left.parent, own):
        raise InputError(f"{left}: not as the stage made it ({wrong})")


def manifest_if_any(folder: Path) -> dict[str, Any]:
    """The manifest of a stage's folder; empty where there is none.

    Raises:
        InputError: not one of ours, or changed since it was written.
    """
    return read_manifest(folder) if (folder / MANIFEST).is_file() else {}


def run_id(manifest: Mapping[str, Any]) -> str:
    """Which run a stage's manifest is of: a hash of its configuration and of what it reads."""
    return sha256_json([manifest["config"], manifest["inputs"]])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a stage's folder.

    Raises:
        InputError: missing, not one of ours, or changed since it was written.
    """
    path = folder / MANIFEST
    problem = "not a manifest of ours"
    manifest = read_json_value(path, problem)
    with parsing(path, problem):
        manifest["stage"], manifest["status"], manifest["config"], manifest["inputs"]
    # Manifests from before had no hash; a damaged name of the key leaves "made_by", which is as old.
    signed = "sha256" in manifest or "made_by" in manifest
    if signed and manifest.get("sha256") != sha256_json({k: v for k, v in manifest.items() if k != "sha256"}):
        raise InputError(f"{path}: differs from its own hash: damaged, or changed by hand")
    return dict(manifest)


def first_day(workdir: Path) -> str:
    """ISO date on which the first stage of a work directory was begun; "" before that, or where no manifest says so.

    Raises:
        InputError: a manifest that is not one of ours.
    """
    manifests = (read_manifest(path.parent) for path in workdir.glob(f"*/{MANIFEST}"))
    return min((str(m["date"]) for m in manifests if m.get("date")), default="")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing_file(path) as new:
        new.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Likewise, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Likewise, for people to read too."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


@functools.cache
def _code() -> str:
    """Hash of the package's own files: versions tell development states apart by chance only."""
    return sha256_folder(Path(__file__).parent, ("**/*.py",))


def plain(value: Any) -> Any:
    """JSON types only: ConfigDicts to dicts, tuples to lists, paths to strings, as addresses where they are of an object store."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return by_address(value) if isinstance(value, Path) else value
