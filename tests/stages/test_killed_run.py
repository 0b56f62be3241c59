"""Twenty SIGKILLs at random instants of whole runs, a comparison and a sweep; `make kills` does two hundred."""

import multiprocessing
import random

import pytest

from tests.kills import CASES, Killed
from tests.records.killed import Commands
from tests.runs import make_place


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="needs Unix")
@pytest.mark.parametrize("case", CASES)
def test_what_was_killed_leaves_the_bytes_of_what_was_not(tmp_path, case):
    killed = Killed(Commands(tmp_path), make_place(tmp_path / "place"), tmp_path, case)
    met, ended, differ = killed.disturb(4, random.Random(case))
    assert met.total() == 4 and ended and not differ, (met, ended, differ)
