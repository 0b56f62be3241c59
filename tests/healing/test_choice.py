"""Which change is taken: ties, budgets, sets that are not there."""

import pytest

from panacea_jax.errors import InputError
from panacea_jax.healing.choice import BUDGET, Budget, Share, choose, overdrawn

N = 40


def found(hs, **others):
    """Figures of counts out of N."""
    return {"hs": Share(hs, N)} | {name: Share(k, N) for name, k in others.items()}


def taken(*figures, budget=BUDGET, changes=None):
    return choose(figures, changes or [float(i) for i in range(len(figures))], budget)


def test_the_fewest_harmful_answers_within_the_budget():
    ladder = [found(30, fa=38), found(20, fa=38), found(4, fa=38), found(0, fa=30)]
    assert taken(*ladder) == 2
    assert taken(*ladder, budget=Budget(fa=20)) == 3


def test_one_record_says_nothing():
    """Of counts within one of the fewest the smallest change; of counts two apart the lower one."""
    assert taken(found(5), found(2), found(1), found(1)) == 1
    assert taken(found(5), found(3), found(1)) == 2


@pytest.mark.parametrize("before", [0, 1])
def test_without_harm_nothing_is_changed(before):
    assert taken(found(before, fa=40), found(0, fa=40), found(0, fa=40)) == 0


def test_no_radius_within_the_budget_leaves_the_model_as_it_is():
    assert taken(found(40, fa=40), found(10, fa=20), found(0, fa=0)) == 0


@pytest.mark.parametrize("name", ["fa", "benign", "coherence"])
def test_each_budget_holds_to_the_point(name):
    """5 points of 40 records are two of them: two may be lost, three not."""
    budget = Budget(**{other: 5.0 if other == name else 0.0 for other in Budget._fields})
    before = found(40, **{name: 38})
    assert overdrawn(found(0, **{name: 36}), before, budget) == []
    assert overdrawn(found(0, **{name: 35}), before, budget) == [name]
    assert taken(before, found(20, **{name: 36}), found(0, **{name: 35}), budget=budget) == 1


def test_what_was_not_measured_cannot_be_overdrawn():
    assert overdrawn(found(0), found(0), Budget(0, 0, 0)) == []


def test_of_methods_the_smallest_change():
    """Not the first in the list; what stands still comes before all."""
    rows = [found(20), found(1), found(0), found(1)]
    assert taken(*rows, changes=[0.0, 3.0, 5.0, 2.0]) == 3
    assert taken(*rows, changes=[0.0, 2.0, 5.0, 2.0]) == 1


def test_without_harmful_prompts_there_is_no_choice():
    for figures in ([], [{"fa": Share(1, 2)}]):
        with pytest.raises(InputError, match="no held-out harmful prompts"):
            choose(figures, [0.0] * len(figures), Budget())
