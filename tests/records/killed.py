"""Real processes that run one `panacea` command each and kill themselves with SIGKILL part of the way.

They are forked from a server that has the imports behind it (``multiprocessing``'s "forkserver",
started by ``exec`` and so free of this process's threads), because ten times two interpreters that
import jax and transformers would take minutes. Nothing else is shared: each has its own pid, its own
jax, and ends by the exit code of the command line or by the signal.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PRELOAD = [
    "panacea_jax.cli",
    "panacea_jax.stages.generate",
    "panacea_jax.stages.judge",
    # what reading a tokenizer imports, most of a start's time; the tests have torch, which it imports too
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
    "transformers.generation.configuration_utils",
    "tests.records.killed",
]


def _command(
    arguments: Sequence[str], log: str, files: Sequence[Path], kill_at: int, after: float, environment: Mapping[str, str]
) -> None:  # fmt: skip
    """What the child does: the command line, with its output in a file."""
    os.environ.update(environment)
    from panacea_jax import cli

    if kill_at:
        _kill_at(files, kill_at)
    if after:
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    with (
        open(log, "a") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        code = cli.run(arguments)
    os._exit(code)


def _kill_at(files: Sequence[Path], count: int) -> None:
    """End this process with SIGKILL when it is about to flush line ``count``: another process that looks on would come too late."""
    flush = os.fsync

    def fsync(file: int) -> None:
        if lines(files) >= count:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(file)

    os.fsync = fsync


class Commands:
    """Command lines in processes of their own; what they compile outlives them, as all that tests do."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._log = folder / "log"
        self._environment = environment or {}  # the server has that of the session's first such test

    def __call__(
        self, arguments: Sequence[str], files: Sequence[Path] = (), kill_at: int = 0, after: float = 0
    ) -> int:
        """Run a command line; −9 if it was killed, which happens once ``files`` have ``kill_at`` lines, or ``after`` seconds (0: never)."""
        process = self._context.Process(
            target=_command, args=(list(arguments), str(self._log), list(files), kill_at, after, self._environment)
        )
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def log(self) -> str:
        return self._log.read_text()


def lines(paths: Sequence[Path]) -> int:
    """Whole lines in all of these files."""
    return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())


def tear(paths: Sequence[Path], keep: float) -> None:
    """Cut the last line of the newest file, as a kill in the middle of its write leaves it."""
    path = max((p for p in paths if p.exists()), key=lambda p: p.stat().st_mtime_ns)
    whole = path.read_bytes()
    head, last = whole[: whole[:-1].rfind(b"\n") + 1], whole[whole[:-1].rfind(b"\n") + 1 :]
    path.write_bytes(head + last[: max(1, int(keep * (len(last) - 1)))])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def records(path: Path) -> Iterator[dict]:
    for line in path.read_text("utf-8").splitlines():
        yield json.loads(line)
