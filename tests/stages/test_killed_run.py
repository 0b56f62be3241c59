"""Twenty SIGKILLs at random instants of whole runs; `make kills` does two hundred."""

import multiprocessing
import random

import pytest

from tests.kills import METHODS, Killed
from tests.records.killed import Commands
from tests.runs import make_place


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="needs Unix")
@pytest.mark.parametrize(("method", "kills"), [*zip(METHODS, (8, 6, 6), strict=True)])
def test_a_killed_run_leaves_the_bytes_of_one_that_was_not(tmp_path, method, kills):
    killed = Killed(Commands(tmp_path), make_place(tmp_path / "place"), tmp_path, method)
    met, differ = killed.disturb(kills, random.Random(method))
    assert met > kills // 2 and not differ, (met, differ)
