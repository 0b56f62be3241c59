"""Hashes of files: what was read and written, and whether it is still so."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from panacea_jax.data.files import sha256
from panacea_jax.disk import replacing_file
from panacea_jax.untrusted import opened

SUMS = "SHA256SUMS"

# Bytes of a file from which on pieces of it stand for all, and how many: each is 64 KiB, the first holds a safetensors header.
LARGE, PIECES = 64 * 2**20, 256
# Of what lies in a stage's folder: what people or trackers go on writing to, and checkpoints, whose arrays have checksums of their own.
_CHANGING = ("README.md", "events.out.tfevents.*", "*.id", "*.minisig", ".*")
_CHANGING_FOLDERS = {"checkpoints", "wandb", "mlruns"}


def sha256_json(value: Any) -> str:
    """Hash of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_folder(folder: Path, patterns: tuple[str, ...]) -> str:
    """Hash over the names, sizes and contents of the files of a folder; of files from 64 MiB on over pieces of the contents.

    Hashing a 7B folder would take longer than loading it, and a copy of it on another machine, with other times, is the same.
    """
    digest = hashlib.sha256()
    for path in sorted(p for pattern in patterns for p in folder.glob(pattern) if p.is_file()):
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name}:{size}".encode())
            if size < LARGE:
                digest.update(file.read())
                continue
            for start in range(0, size, size // PIECES):
                file.seek(start)
                digest.update(file.read(2**16))
    return digest.hexdigest()


def sha256_model(folder: Path) -> str:
    """Hash of a model or an adapter: its configuration and its weights."""
    return sha256_folder(folder, ("*.json", "*.safetensors"))


def sums_of(folder: Path, manifest: str) -> dict[str, str]:
    """The hash of every file below a folder that is to stay as it is, by its path there.

    Args:
        folder: of a stage.
        manifest: name of the file that tells a stage's folder; of other such folders below nothing is looked at, nor is the file itself.
    """
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(_files(folder, manifest))}


def _files(folder: Path, manifest: str) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            if path.name not in _CHANGING_FOLDERS and not path.name.startswith(".") and not (path / manifest).is_file():
                yield from _files(path, manifest)
        elif path.name != manifest and not any(path.match(pattern) for pattern in _CHANGING):
            yield path


def difference(folder: Path, sums: Mapping[str, str]) -> str:
    """The first file that is not as it was: "adapter/config.json is missing"; "" for none.

    Args:
        folder: that the paths are of.
        sums: hash by path.
    """
    for name, digest in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} differs from its sha256"
    return ""


def unnamed(folder: Path, sums: Mapping[str, str], manifest: str) -> str:
    """The first file below a folder that is to stay as it is but has no hash in ``sums``; "" for none. ``manifest`` as of ``sums_of``."""
    return next((name for path in sorted(_files(folder, manifest)) if (name := path.relative_to(folder).as_posix()) not in sums), "")


def note_sums(folder: Path, files: Iterable[Path]) -> None:
    """Note the hashes of files of a folder in its SHA256SUMS, which ``sha256sum -c`` reads too; other lines stay."""
    noted = read_sums(folder)
    sums = noted | {path.name: sha256(path) for path in files}
    if sums == noted:
        return
    with replacing_file(folder / SUMS) as new:
        new.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())), "utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """Hash by name, as noted in a folder's SHA256SUMS; empty where there is none. A damaged line fits no file."""
    path = folder / SUMS
    lines = path.read_text("utf-8", errors="replace").removesuffix("\n").split("\n") if path.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
