"""Addresses in object stores, ``s3://BUCKET/KEY`` and ``gs://BUCKET/KEY``, and the local folders that stand for them.

The stand-in of an address has the address in its own path, so that the one is told from the other without looking anything up.
"""

import hashlib
import os
import re
from pathlib import Path, PurePath

# The part of a name that says which store; pathlib makes one slash of two.
_SCHEME = re.compile(r"(s3|gs):/+")


def is_address(where: str | PurePath) -> bool:
    """Whether something is in an object store."""
    return _SCHEME.match(str(where)) is not None


def address_of(where: str | PurePath) -> str:
    """An address in its one form: two slashes after the scheme, none at the end."""
    scheme, rest = _SCHEME.sub(r"\1 ", str(where), count=1).split(" ", 1)
    return f"{scheme}://{rest.rstrip('/')}"


def cache_folder() -> Path:
    """Where stand-ins lie: ``PANACEA_CACHE``, else ``panacea_jax`` in the user's folder for caches."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PANACEA_CACHE") or Path(home) / "panacea_jax").absolute()


def cache_place(address: str, kind: str) -> Path:
    """The folder for all that belongs to one stand-in: itself, and notes about it."""
    return cache_folder() / kind / hashlib.sha256(address.encode()).hexdigest()[:16]


def stand_in_of(address: str, kind: str) -> Path:
    """The path that stands for an address.

    Args:
        address: in its one form.
        kind: what for: "read", or "work", for all processes of a run but the first with its number.
    """
    scheme, _, path = address.partition("://")
    return cache_place(address, kind) / scheme / path


def by_address(text: str | PurePath) -> str:
    """A path or a text with addresses in place of the stand-ins in it: what manifests, messages and people are told."""
    return re.sub(rf"{re.escape(str(cache_folder()))}/(?:read|work\d*)/[0-9a-f]{{16}}/(s3|gs)(?:/|$)", r"\1://", str(text))
