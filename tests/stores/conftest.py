import os
import re

import pytest

from panacea_jax.stores import objects


@pytest.fixture(scope="session")
def s3_server():
    """One server for all tests; each has a folder of its own in the bucket."""
    for package in ("moto", "flask", "s3fs"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'panacea_jax[test]'")
    from tests.stores.server import BUCKET, Server

    server = Server()
    before = dict(os.environ)
    os.environ.update(server.environment())
    objects._file_system.cache_clear()
    objects._file_system("s3").mkdir(BUCKET)
    yield server
    objects._file_system.cache_clear()
    os.environ.clear()
    os.environ.update(before)
    server.close()


@pytest.fixture
def store(s3_server, tmp_path, monkeypatch, request):
    """The server, its ``root`` an address for this test alone; stand-ins lie in a folder of the test."""
    monkeypatch.setenv("PANACEA_CACHE", str(tmp_path / "cache"))
    s3_server.root = f"s3://bucket/{re.sub(r'[^a-z0-9_]', '-', request.node.name)}"
    s3_server.asked.clear()
    return s3_server
