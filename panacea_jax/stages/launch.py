"""The command ``launch``: the launch scripts that come with the package, for a machine where there is no clone of it."""

import sys
from pathlib import Path

from panacea_jax.errors import InputError
from panacea_jax.shipped import shipped


def scripts() -> dict[str, Path]:
    """Every script, manifest and sweep by its file's name, like ``slurm.sbatch`` and ``gke/tpu.yaml``."""
    folder = shipped("launch", "launch")
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix not in (".py", ".pyc"))  # fmt: skip
    return {file.relative_to(folder).as_posix(): file for file in files}


def print_script(name: str) -> None:
    """Print one script to stdout, or without a name their names and where they lie.

    Args:
        name: of the file; its suffix may be left out where no other has the same stem.

    Raises:
        InputError: no such script, or several.
    """
    known = scripts()
    found = [path for script, path in known.items() if name in (script, script.rpartition(".")[0])]
    if not name:
        for script, path in known.items():
            print(f"{script:<16} {path}")
    elif len(found) != 1:
        raise InputError(f"--print={name}: no one script of that name; known are {', '.join(known)}")
    else:
        sys.stdout.write(found[0].read_text("utf-8"))
