"""The base of the tests of adapters; files with bases of their own have them under the same names."""

import pytest

from panacea_jax.models.model import load
from tests.families import build, save


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A transformers model with grouped heads, so that no two projections have the same shape by chance."""
    return save(build("llama3.1"), tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def model(base):
    return load(base, dtype="float32")
