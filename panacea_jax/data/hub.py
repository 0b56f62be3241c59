"""Rows of a data set on the Hugging Face hub; the one reader that uses the network."""

from collections.abc import Iterator
from typing import Any

from panacea_jax.data.files import undecoded
from panacea_jax.errors import InputError
from panacea_jax.untrusted import reason


def split_id(where: str) -> tuple[str, str | None, str | None]:
    """``owner/name[/subset][:split]`` -> ("owner/name", subset or None, split or None)."""
    path, _, split = where.partition(":")
    owner, name, *subset = path.split("/")
    return f"{owner}/{name}", (subset[0] if subset else None), split or None


def hub_rows(where: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a hub set; without a split, "train" or the only one there is.

    Raises:
        InputError: The set, its subset or its split cannot be loaded, or several splits are left
            to choose from.
    """
    import datasets

    path, subset, split = split_id(where)
    try:
        found = datasets.load_dataset(path, name=subset, split=split)
    except Exception as error:  # offline, unknown, gated, a loading script: the user's to fix, all
        raise InputError(f"{where}: cannot be loaded from the hub ({reason(error)})") from error
    if isinstance(found, dict):
        names = [str(name) for name in found]
        if len(names) > 1 and "train" not in names:
            raise InputError(f"{where}: choose a split with :SPLIT, one of {', '.join(names)}")
        found = found["train" if "train" in names else names[0]]
    for number, row in enumerate(undecoded(found), start=1):
        yield f"{where}: record {number}", row
