"""Checkpoints by orbax: asynchronous, the newest N kept, restored onto whatever mesh is in use."""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from panacea_jax.errors import InputError, no_space
from panacea_jax.progress import say
from panacea_jax.train.step import TrainState


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path, e.g. ``params.layers.self_attn.q_proj.a``: readable without our classes, stable when they move."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    # On disk the state of a defence goes by the name that checkpoints have had from the first.
    return {re.sub(r"^defence_state\b", "defence", name): x for name, x in named.items()}


class Checkpoints:
    """The checkpoints of one stage, ``<folder>/<step>/``."""

    def __init__(self, folder: Path, every: int = 0, keep: int = 2, stay: int = 0) -> None:
        """Open or create the folder.

        Args:
            folder: ``WORKDIR/<stage>/checkpoints``.
            every: save each so many steps; 0 saves only when asked (at the end, on SIGTERM).
            keep: number of newest checkpoints kept.
            stay: save each so many steps too, and keep these all; 0: none.
        """
        self.folder, self.every, self._stay = folder, every, stay
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=stay or None, create=True)
        self._silence = contextlib.ExitStack()
        self._silence.enter_context(_one_voice())
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def latest(self) -> int | None:
        """Newest complete step, or None."""
        step = self._manager.latest_step()
        return None if step is None else int(step)

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` steps is to be saved."""
        return any(every > 0 and step % every == 0 for every in (self.every, self._stay))

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Start saving; the arrays are copied off the device before this returns, so the state may be donated afterwards."""
        step = int(state.step)
        if step == self.latest():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(flatten(state)), meta=ocp.args.JsonSave(meta)
        )
        self._manager.save(step, args=args)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, in the shapes, dtypes and shardings of ``state``, and what was noted with it.

        Raises:
            InputError: the checkpoint is damaged, or belongs to other shapes.
        """
        step = self.latest()
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), flatten(state)
        )
        try:
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()
            )
            with _quiet():
                found = self._manager.restore(step, args=args)
        except Exception as error:  # orbax and tensorstore raise many kinds for a broken file
            raise InputError(
                f"{self.folder / str(step)}: damaged checkpoint, or one of another model or adapter "
                f"({_first_line(error)}); remove that folder to go on from an older one"
            ) from error
        say(f"resumed from {self.folder / str(step)}")
        leaves = [found.state[name] for name in flatten(state)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), found.meta

    def close(self) -> None:
        """Wait for pending saves."""
        self._manager.wait_until_finished()
        self._manager.close()
        self._silence.close()


class PastCheckpoint(Checkpoints):
    """One of the checkpoints that a stage kept, in the place of all: training to that step resumes from it, and saves nothing."""

    def __init__(self, folder: Path, step: int) -> None:
        """
        Args:
            folder: ``WORKDIR/<stage>/checkpoints``.
            step: which.
        """
        super().__init__(folder)
        self._step = step

    def latest(self) -> int | None:
        """The step."""
        return self._step

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Nothing."""


def newest_checkpoint(stage: Path) -> Path | None:
    """The newest of ``STAGE/checkpoints/<step>/``; None where none is left."""
    found = [path for path in (stage / "checkpoints").glob("*") if path.name.isdigit()]
    return max(found, key=lambda path: int(path.name), default=None)


def read_checkpoint(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Every array of one checkpoint folder (``…/checkpoints/<step>``) on the host by dotted path, and what was noted with it.

    Raises:
        InputError: not a checkpoint, or a damaged one.
    """
    if not (folder / "state").is_dir():
        raise InputError(f"{folder}: not a checkpoint of ours (no 'state' in it)")
    folder = folder.resolve()
    try:
        with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as arrays:
            metadata = arrays.metadata(folder / "state").item_metadata.tree
            target = {k: np.zeros(m.shape, m.dtype) for k, m in metadata.items()}
            state = arrays.restore(folder / "state", args=ocp.args.StandardRestore(target))
        with _quiet(), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as notes:
            meta = notes.restore(folder / "meta", args=ocp.args.JsonRestore())
    except Exception as error:  # as above
        raise InputError(f"{folder}: damaged checkpoint ({_first_line(error)})") from error
    return {name: np.asarray(value) for name, value in state.items()}, meta


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
def _one_voice() -> Iterator[None]:
    """Leave it to the command line to say that the disk is full: orbax writes in threads and tasks of its own, each of which logs it."""

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or no_space(error) is None

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(keep)
    with _no_late_words():
        yield
    for logger in loggers:  # not after a failure: what is left of the threads speaks later still
        logger.removeFilter(keep)


@contextlib.contextmanager
def _no_late_words() -> Iterator[None]:
    """tensorstore's threads come back to an event loop that the first failure has closed; after one that stays unprinted."""
    previous = sys.unraisablehook

    def hook(event: "sys.UnraisableHookArgs") -> None:
        if str(event.exc_value) != "Event loop is closed":
            previous(event)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = previous


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
