"""The folder of a model: a local path, or a download when an address in an object store or a hub id is named."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from panacea_jax.errors import InputError
from panacea_jax.stores import stand_in

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Of a model's folder what is read; pickled weights are not, and may be as large.
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja"]


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``owner/name``; a folder may have it too."""
    return _HUB_ID.fullmatch(name) is not None


def local_folder(where: str | PurePath, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """The folder itself, what was fetched from an object store, or the local snapshot of a hub id ``owner/name`` when there is no such
    folder.

    Args:
        where: folder, address or hub id.
        patterns: of the files that are needed of a download.

    Raises:
        InputError: neither a folder nor a hub id that can be fetched.
    """
    folder = stand_in(where, patterns).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(str(where)):
        raise InputError(f"{where}: no such model folder, and not a hub id (owner/name)")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(where), allow_patterns=list(patterns)))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{where}: no such folder here, and not fetched from the hub: {reason[0]}"
        ) from error
