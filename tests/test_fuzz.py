"""A few random inputs to every parser of what strangers hand in, and all that failed once; ``make fuzz`` tries 200,000."""

import pytest

from tests.fuzz import TARGETS, fuzz, tried
from tests.fuzz_seeds import SEEDS


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@pytest.mark.parametrize("name", TARGETS)
def test_random_input_is_taken_or_refused(name):
    fuzz(name, max(5, 40 // TARGETS[name].cost), number=1)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in SEEDS.items() for value in values])
def test_what_failed_once_is_refused(name, value):
    assert tried(TARGETS[name], value)
