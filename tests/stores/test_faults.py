"""What a store, or the way there, does wrong: tried again, then one line and an exit code."""

import time

import fsspec
import pytest

from panacea_jax.errors import InputError, StoreFailed
from panacea_jax.stores import claims, objects, publish, session, stand_in, working_copy
from panacea_jax.stores.objects import Objects
from tests.runs import panacea


@pytest.fixture(autouse=True)
def quick(monkeypatch, store):
    """Clients that wait shorter between attempts, and for answers, than they do by default; made anew for a test."""
    patience(monkeypatch, read_timeout=0.4, retries={"max_attempts": 3, "mode": "standard"})
    yield
    objects._file_system.cache_clear()


def patience(monkeypatch, **settings):
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": settings})
    objects._file_system.cache_clear()


def times(count, status, seconds=0.0):
    """So many requests get this answer, after so long; then the server answers."""
    left = iter(range(count))

    def fault(method, path):
        if next(left, None) is None:
            return None
        time.sleep(seconds)
        return status

    return fault


@pytest.mark.parametrize(("count", "status", "seconds"), [(2, 503, 0), (2, 500, 0), (1, 503, 0.6)], ids=["503", "500", "slow"])
def test_what_passes_by_itself_is_not_noticed(count, status, seconds, store):
    there = Objects(f"{store.root}/run")
    with store.failing(times(count, status, seconds)):
        there.write("a", b"content")
    with store.failing(times(count, status, seconds)):
        assert stand_in(f"{store.root}/run").joinpath("a").read_bytes() == b"content"
    assert len(store.asked) > 2 * count


def test_a_read_that_stays_slow_is_one_line(store, monkeypatch):
    Objects(f"{store.root}/run").write("a", b"content")
    patience(monkeypatch, read_timeout=0.1, retries={"max_attempts": 0})
    with store.failing(times(1000, 503, 0.2)), pytest.raises(InputError, match=rf"^{store.root}/run: cannot be read \(\w+: "):
        stand_in(f"{store.root}/run")


def test_a_store_that_takes_no_more_ends_the_command_and_keeps_what_it_has(store, capsys, monkeypatch):
    with session():
        (working_copy(f"{store.root}/run") / "before").parent.mkdir(parents=True, exist_ok=True)
        (working_copy(f"{store.root}/run") / "before").write_text("before")
    writing = False

    def full(method, path):
        return 503 if writing and method == "PUT" else None

    patience(monkeypatch, retries={"max_attempts": 1})
    with store.failing(full), pytest.raises(StoreFailed, match="cannot be written"), session():
        file = working_copy(f"{store.root}/run") / "after"
        file.write_text("after")
        writing = True
        publish(file)
    assert sorted(name for name in Objects(f"{store.root}/run").listed() if name[0] != ".") == ["before"]
    monkeypatch.setattr(claims, "SILENCE", 0.0)  # the claim could not be let go either
    with session():
        assert (working_copy(f"{store.root}/run") / "before").read_text() == "before"


def judged(address, capsys):
    code = panacea("report", f"--workdir={address}")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    return code, said[0]


def test_a_bucket_that_is_not_there_is_one_line(store, capsys):
    code, said = judged("s3://nobodys-bucket/run", capsys)
    assert code == 2 and said.startswith("panacea: s3://nobodys-bucket/run: cannot be written (FileNotFoundError: ")
    code, said = judged("s3://", capsys)
    assert code == 2 and "names no bucket" in said


def test_without_credentials_is_one_line(store, capsys, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    code, said = judged(f"{store.root}/run", capsys)
    assert code == 2 and "credentials" in said.lower()


def test_without_the_package_is_one_line(store, capsys, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    code, said = judged(f"{store.root}/run", capsys)
    assert (code, said) == (2, "panacea: s3://…: needs s3fs; pip install 'panacea_jax[s3]'")


def test_a_folder_that_may_only_be_read_is_one_line(store, capsys):
    with store.failing(lambda method, path: 403 if method == "PUT" else None):
        code, said = judged(f"{store.root}/run", capsys)
    assert code == 2 and f"{store.root}/run: cannot be written (PermissionError" in said
