"""Checkpoints by orbax: asynchronous, the newest N kept, restored onto whatever mesh is in use, and believed only as they were saved.

Notes are saved with the arrays: a checksum of each, which run they are of, and a hash of the notes themselves. All of that is in the
checkpoint before orbax gives it its name, so a kill leaves none without.
"""

import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from panacea_jax.disk import check_room, check_there
from panacea_jax.errors import InputError, no_space, out_of_reach
from panacea_jax.parallel import processes
from panacea_jax.progress import say
from panacea_jax.stores import direct, publish, published
from panacea_jax.sums import sha256_json
from panacea_jax.train.checksums import checksums
from panacea_jax.train.step import TrainState

FALLBACK = "fallback"
# Notes of ours beside those of the loop.
_RUN, _CHECKSUMS, _HASH = "run", "checksums", "sha256"
# How the words begin that threads and tasks of orbax say after a failure.
_LATE = ("Event loop is closed", "Encountered error while reading array")


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path, e.g. ``params.layers.self_attn.q_proj.a``: readable without our classes, stable when they move."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    # On disk the state of a defence goes by the name that checkpoints have had from the first.
    return {re.sub(r"^defence_state\b", "defence", name): x for name, x in named.items()}


class Checkpoints:
    """The checkpoints of one stage, ``<folder>/<step>/``."""

    def __init__(
        self, folder: Path, every: int = 0, keep: int = 2, stay: int = 0, *, run: str = "", on_damage: str = FALLBACK
    ) -> None:  # fmt: skip
        """Open or create the folder.

        Args:
            folder: ``WORKDIR/<stage>/checkpoints``.
            every: save each so many steps; 0 saves only when asked (at the end, on SIGTERM).
            keep: number of newest checkpoints kept.
            stay: save each so many steps too, and keep these all; 0: none.
            run: of which these are, ``workdir.run_id``; "": not told, and not asked for.
            on_damage: of a checkpoint that cannot be believed, ``"fallback"``: name it and go on from the one before; ``"stop"``.
        """
        self.folder, self.every, self._stay = folder, every, stay
        self._run, self._on_damage = run, on_damage
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=stay or None, create=True)
        self._silence = contextlib.ExitStack()
        self._silence.enter_context(_one_voice(folder))
        with _quiet():
            self._manager = ocp.CheckpointManager(direct(folder), options=options)

    def latest(self) -> int | None:
        """Newest step, or None; whether it can be believed is seen when it is restored."""
        return max(self._steps(), default=None)

    def _steps(self) -> list[int]:
        """Steps that there is a checkpoint of; as the first process sees it, since clients of NFS see a new one late."""
        return list(processes.from_first(checkpoint_steps(self.folder)))

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` steps is to be saved."""
        return any(every > 0 and step % every == 0 for every in (self.every, self._stay))

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Start saving; the arrays are copied off the device before this returns, so the state may be donated afterwards.

        Raises:
            OSError: there is no room for it, or the folder is gone; said before anything is written.
        """
        step, arrays = int(state.step), flatten(state)
        if step == self._manager.latest_step():
            return
        if isinstance(direct(self.folder), Path):
            check_there(self.folder)
            check_room(self.folder, sum(x.nbytes for x in arrays.values()))
        publish(self.folder.parent)  # what was logged until here, without which nobody could go on from it
        notes = _signed(meta | {_RUN: self._run, _CHECKSUMS: checksums(arrays)})
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(notes))
        self._manager.save(step, args=args)
        if published(self.folder):
            self._manager.wait_until_finished()
            publish(self.folder)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint that can be believed, in the shapes, dtypes and shardings of ``state``, and what was noted with it.

        Those after it are renamed to ``<step>.damaged``, and a warning names them.

        Raises:
            InputError: it is damaged, of another run or of other shapes, and so are those before it or ``on_damage`` is ``"stop"``;
                then nothing is changed.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._steps(), reverse=True):
            arrays, notes, why = self._read(step, flatten(state))
            if not why:
                self._set_aside(damaged)
                say(f"resumed from {self.folder / str(step)}")
                return jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in flatten(state)]), notes
            damaged[step] = why
            if self._on_damage != FALLBACK:
                break
        step, why = next(iter(damaged.items()))
        rest = ", and none before it is better" if self._on_damage == FALLBACK else "; remove that folder to go on from an older one"
        raise InputError(f"{self.folder / str(step)}: damaged checkpoint, or one of another run ({why}){rest}")

    def _read(self, step: int, like: Mapping[str, jax.Array]) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Arrays, notes, and why they cannot be believed; every process comes to the same."""
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), dict(like))
        arrays: dict[str, Any] = {}
        notes: dict[str, Any] = {}
        try:
            arrays, notes = _restore(self.folder / str(step), target)
            why = _disbelieved(notes, self._run)
        except Exception as error:  # orbax and tensorstore raise many kinds for a broken file
            self._silence.pop_all()  # to stay: what is left of their threads speaks later still
            why = _said(error)
        why = next(filter(None, processes.heard(why)), "")  # each reads its part only, and checksums are taken together
        return arrays, notes, why or _changed(arrays, notes)

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        """Rename checkpoints that nobody is to go on from, and let orbax look again."""
        if not damaged:
            return

        def rename() -> None:
            for step, why in damaged.items():
                path = direct(self.folder / str(step))
                aside = next(p for n in range(1000) if not (p := path.with_name(f"{step}.damaged{n or ''}")).exists())
                path.rename(aside)
                absl_logging.warning("%s: damaged checkpoint (%s); it is kept as %s, and the one before is used", path, why, aside.name)

        processes.once(rename)
        with _quiet():
            self._manager.reload()

    def close(self) -> None:
        """Wait for pending saves."""
        self._manager.wait_until_finished()
        self._manager.close()
        self._silence.close()


class PastCheckpoint(Checkpoints):
    """One of the checkpoints that a stage kept, in the place of all: training to that step resumes from it, and saves nothing."""

    def __init__(self, folder: Path, step: int, run: str = "") -> None:
        """
        Args:
            folder: ``WORKDIR/<stage>/checkpoints``.
            step: which.
            run: see ``Checkpoints``.
        """
        super().__init__(folder, run=run, on_damage="stop")
        self._step = step

    def _steps(self) -> list[int]:
        return [self._step]

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Nothing."""


def newest_checkpoint(stage: Path) -> Path | None:
    """The newest of ``STAGE/checkpoints/<step>/``; None where none is left."""
    folder = stage / "checkpoints"
    return max((folder / str(step) for step in checkpoint_steps(folder)), key=lambda path: int(path.name), default=None)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps in the names of a folder of checkpoints; what orbax has not finished, or we set aside, is called otherwise."""
    at = direct(folder)
    found = [path for path in at.glob("*") if path.name.isdecimal()]
    # Where a folder cannot be renamed it has its name from the first, and a file that says so when it is whole.
    return sorted(int(path.name) for path in found if isinstance(at, Path) or (path / "commit_success.txt").exists())


def read_checkpoint(folder: Path, run: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Every array of one checkpoint folder (``…/checkpoints/<step>``) on the host by dotted path, and what was noted with it.

    Args:
        folder: of the checkpoint.
        run: that it is to be of, see ``Checkpoints``.

    Raises:
        InputError: not a checkpoint, a damaged one, or one of another run.
    """
    if not (direct(folder) / "state").is_dir():
        raise InputError(f"{folder}: not a checkpoint of ours (no 'state' in it)")
    try:
        with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as stored:
            metadata = stored.metadata(direct(folder) / "state").item_metadata.tree
        arrays, notes = _restore(folder, {k: np.zeros(m.shape, m.dtype) for k, m in metadata.items()})
        why = _disbelieved(notes, run) or _changed(arrays, notes)
    except Exception as error:  # as above
        why = _said(error)
    if why:
        raise InputError(f"{folder}: damaged checkpoint ({why})")
    return {name: np.asarray(value) for name, value in arrays.items()}, notes


def _restore(folder: Path, target: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays as ``target`` has them, and notes. By orbax's handlers alone: its manager lets processes wait for each other, so that one
    which meets damage would leave the others waiting."""
    at = direct(folder)
    with _quiet():
        arrays = ocp.StandardCheckpointHandler().restore(at / "state", args=ocp.args.StandardRestore(target))
        notes = ocp.JsonCheckpointHandler().restore(at / "meta", args=ocp.args.JsonRestore())
    return dict(arrays), dict(notes)


def _signed(notes: dict[str, Any]) -> dict[str, Any]:
    """Notes with their own hash."""
    notes = json.loads(json.dumps(notes))  # as they will be read
    return notes | {_HASH: sha256_json(notes)}


def _disbelieved(notes: Mapping[str, Any], run: str) -> str:
    """Why notes are not those that were saved, or not of this run; "" where nothing speaks against them."""
    if _HASH not in notes and _CHECKSUMS not in notes:  # saved before there were any
        return ""
    if notes.get(_HASH) != sha256_json({k: v for k, v in notes.items() if k != _HASH}):
        return "its notes differ from their hash"
    return "it is of another run" if run and notes[_RUN] not in ("", run) else ""


def _changed(arrays: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    """Which array differs from what was saved; "" for none, or where that was not noted."""
    if _CHECKSUMS not in notes:
        return ""
    noted = notes[_CHECKSUMS]
    found = checksums(arrays)
    wrong = [name for name in noted if noted[name] != found.get(name)]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"array {wrong[0]}{more} differs from its checksum" if wrong else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave it to us to say what is wrong with a checkpoint, in one line.

    orbax warns of files that a manager's checkpoint has elsewhere. And when one array of many is damaged, it closes its event loop
    while others are still being read, and tensorstore prints a traceback for each that ends later, from threads of its own; so after
    a failure that message stays unprinted.
    """
    orbax = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or "orbax" not in Path(record.pathname).parts

    orbax.addFilter(keep)
    try:
        with _no_late_words():
            yield
    finally:
        orbax.removeFilter(keep)


@contextlib.contextmanager
def _one_voice(folder: Path) -> Iterator[None]:
    """Leave it to the command line to say that the disk is full, or gone: orbax writes in threads and tasks of its own, each of which logs
    it."""

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return folder.is_dir() or "orbax" not in Path(record.pathname).parts
        return no_space(error) is None and out_of_reach(error, [str(folder)]) is None

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(keep)
    with _no_late_words():
        yield
    for logger in loggers:  # not after a failure: what is left of the threads speaks later still
        logger.removeFilter(keep)


@contextlib.contextmanager
def _no_late_words() -> Iterator[None]:
    """tensorstore's threads come back to an event loop that the first failure has closed, and reads that nobody waits for any more are told
    to end; after a failure that stays unprinted."""
    previous = sys.unraisablehook

    def hook(event: "sys.UnraisableHookArgs") -> None:
        if not str(event.exc_value).startswith(_LATE):
            previous(event)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = previous


def _said(error: Exception) -> str:
    """Its first line. Of the tasks that read the other arrays Python will say, with a traceback, that nobody asked how they ended; from now
    on that stays unprinted."""
    logging.getLogger("asyncio").addFilter(_asked_for)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def _asked_for(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()
