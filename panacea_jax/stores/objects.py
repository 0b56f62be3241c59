"""The objects below one address, through fsspec: whole objects are listed, fetched, put and deleted, each of which happens or does not.

Credentials, endpoints and retries are those of fsspec's packages, s3fs and gcsfs: taken from the environment, with exponential backoff.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from panacea_jax.errors import InputError, StoreFailed
from panacea_jax.untrusted import reason

_EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}


class Stored(NamedTuple):
    """What a store says of an object: another tag is another content."""

    size: int
    tag: str


class Objects:
    """The objects below an address, by their names from there on; an object that has the very address is called ""."""

    def __init__(self, address: str) -> None:
        """
        Args:
            address: in its one form.

        Raises:
            InputError: no bucket is named, or the package for such stores is not installed.
        """
        self.address = address
        scheme, _, path = address.partition("://")
        if not path:
            raise InputError(f"{scheme}://: names no bucket")
        self._files = _file_system(scheme)
        self._root = path

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def listed(self) -> dict[str, Stored]:
        """Every object, as the store has it now.

        Raises:
            InputError: it cannot be listed, for whatever reason, or a name would lead out of a folder.
        """
        with _answered(self.address, "cannot be read", InputError):
            self._files.invalidate_cache()
            found = self._files.find(self._root, detail=True)
        names = {key[len(self._root) :].lstrip("/"): told for key, told in found.items() if not key.endswith("/")}
        for name in names:
            if (name and any(part in ("", ".", "..") for part in name.split("/"))) or "\0" in name:
                raise InputError(f"{self.address}: the object {name!r} has a name that is none for a file")
        return {name: _stored(told) for name, told in names.items()}

    def fetch(self, files: Mapping[str, Path]) -> None:
        """Objects into files, which are there when they are whole.

        Args:
            files: where to, by name.

        Raises:
            InputError: one cannot be read.
        """
        parts = {name: path.with_name(f".{path.name}.part") for name, path in files.items()}
        if not files:
            return
        for path in parts.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        with _answered(self.address, "cannot be read", InputError):
            self._files.get([self._key(name) for name in files], [str(path) for path in parts.values()])
        for name, path in files.items():
            parts[name].replace(path)

    def put(self, files: Mapping[str, Path]) -> dict[str, Stored]:
        """Files into objects, in place of what was there; each is whole at once. What the store then says of them.

        Raises:
            StoreFailed: one cannot be written.
        """
        with _answered(self.address, "cannot be written", StoreFailed):
            self._files.put([str(path) for path in files.values()], [self._key(name) for name in files])
            return {name: _stored(self._files.info(self._key(name))) for name in files}

    def delete(self, names: Iterable[str]) -> None:
        """Objects that are no more.

        Raises:
            StoreFailed: they stay.
        """
        with _answered(self.address, "cannot be written", StoreFailed):
            for name in names:  # one by one, for lists of them are taken for patterns
                self._files.rm_file(self._key(name))

    def create(self, name: str, data: bytes) -> bool:
        """A new object, unless there is one of that name: the store lets one of all who ask at a time be the first.

        Raises:
            StoreFailed: it cannot be written.
        """
        with _answered(self.address, "cannot be written", StoreFailed):
            try:
                self._files.pipe_file(self._key(name), data, mode="create")
            except FileExistsError:
                return False
            return True

    def write(self, name: str, data: bytes) -> None:
        """A small object, in place of what was there.

        Raises:
            StoreFailed: it cannot be written.
        """
        with _answered(self.address, "cannot be written", StoreFailed):
            self._files.pipe_file(self._key(name), data)

    def read(self, name: str) -> bytes | None:
        """A small object; None where there is none.

        Raises:
            StoreFailed: it cannot be read.
        """
        with _answered(self.address, "cannot be read", StoreFailed):
            try:
                return bytes(self._files.cat_file(self._key(name)))
            except FileNotFoundError:
                return None

    def numbers(self, prefix: str) -> list[int]:
        """The numbers behind ``prefix`` in the names of objects right below the address, in ascending order.

        Raises:
            InputError: it cannot be listed.
        """
        with _answered(self.address, "cannot be read", InputError):
            self._files.invalidate_cache()
            try:
                names = [PurePosixPath(key).name for key in self._files.ls(self._root, detail=False)]
            except FileNotFoundError:
                names = []
        return sorted(int(name.removeprefix(prefix)) for name in names if name.startswith(prefix) and name.removeprefix(prefix).isdecimal())


def _stored(told: Mapping[str, Any]) -> Stored:
    """S3 tells an ETag of the content, GCS a number that every writing raises."""
    return Stored(int(told["size"]), str(told.get("generation") or told["ETag"]))


@functools.cache
def _file_system(scheme: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(scheme, skip_instance_cache=True)
    except ImportError as error:
        raise InputError(f"{scheme}://…: needs {_EXTRAS[scheme]}; pip install 'panacea_jax[{scheme}]'") from error
    except Exception as error:  # of credentials, in a kind of each library's own
        raise InputError(f"{scheme}://…: cannot be used ({reason(error)})") from error


@contextlib.contextmanager
def _answered(address: str, what: str, kind: type[Exception]) -> Iterator[None]:
    """What a store, or the way there, fails with, in one line."""
    try:
        yield
    except Exception as error:  # botocore, aiohttp and google raise many kinds, which fsspec's packages translate in part
        raise kind(f"{address}: {what} ({type(error).__name__}: {reason(error)})") from error
