"""Answers on disk as soon as they are known, though their file is written in the order of its prompts.

Texts end in another order than their prompts have. An answer whose turn has not come goes into a journal beside the file, flushed to
disk, so that a kill loses only what was being decoded; it moves into the file when all before it are there.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from panacea_jax.errors import InputError
from panacea_jax.parallel import processes
from panacea_jax.records.jsonl import Writer, encode_line, resume
from panacea_jax.stores import publish
from panacea_jax.untrusted import opened, parse_json, parsing


class Answers:
    """The answers to one set of prompts, taken in any order; used with ``with``.

    Attributes:
        missing: numbers of the prompts without an answer, in ascending order.
    """

    def __init__(self, path: Path, prompts: Sequence[str]) -> None:
        """Open the file and take over what an earlier run left in its journal. Of several processes the first writes.

        Raises:
            InputError: the file or its journal is damaged or belongs to other prompts.
        """
        self._journal_path = path.with_suffix(".waiting.jsonl")
        waiting, size = _read(self._journal_path, prompts)
        known = set(range(resume(path, prompts))) | waiting.keys()
        self.missing = [i for i in range(len(prompts)) if i not in known]
        self._files: tuple[Writer, BinaryIO] | None = None
        processes.barrier()  # all have read the files before one changes them
        if not processes.first():
            return
        writer = Writer(path, prompts)
        if self._journal_path.exists():
            os.truncate(self._journal_path, size)
        for i, line in waiting.items():
            if i >= writer.done:
                writer.put(i, line)
        self._files = writer, open(self._journal_path, "ab")  # noqa: SIM115 - closed by __exit__

    def put(self, i: int, line: Mapping[str, Any]) -> None:
        """Answer ``i`` is on disk when this returns."""
        if self._files is None:
            return
        writer, journal = self._files
        if i != writer.done:
            journal.write(encode_line({"index": i, "line": line}))
            journal.flush()
            os.fsync(journal.fileno())
            publish(self._journal_path, growing=True)
        writer.put(i, line)

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._files is not None:
            for file in self._files:
                file.close()
            if kind is None:  # every answer is in the file
                self._journal_path.unlink()
                publish(self._journal_path)


def _read(path: Path, prompts: Sequence[str]) -> tuple[dict[int, dict[str, Any]], int]:
    """The whole lines of a journal by number, and where they end."""
    waiting: dict[int, dict[str, Any]] = {}
    size = 0
    lines: list[bytes] = []
    if path.exists():
        with opened(path) as stream:
            lines = stream.read().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        try:
            entry = parse_json(line, place, "damaged line")
            with parsing(place, "damaged line"):
                i, answer = int(entry["index"]), dict(entry["line"])
        except InputError:
            if number == len(lines):
                break  # torn by a kill
            raise
        if not line.endswith(b"\n"):
            break
        if not 0 <= i < len(prompts) or answer.get("prompt") != prompts[i]:
            raise InputError(f"{path}:{number}: not a record of this run; choose another --workdir")
        waiting[i] = answer
        size += len(line)
    return waiting, size
