"""Which candidate of a grid is taken."""

from panacea_jax.comparison.choice import choose_candidate, described, eligible

SFT = {"hs": 90.0, "fa": 80.0, "benign": 100.0}


def figures(hs, fa=80.0, benign=100.0):
    return {"hs": float(hs), "fa": float(fa), "benign": float(benign)}


def test_margins_are_inclusive():
    assert eligible(figures(0, fa=75, benign=90), SFT)
    assert not eligible(figures(0, fa=74.9), SFT)
    assert not eligible(figures(0, benign=89.9), SFT)


def test_lowest_hs_among_the_eligible():
    assert choose_candidate([figures(50), figures(10), figures(0, fa=60), figures(5, benign=50)], SFT) == 1


def test_equals_are_parted_by_use_then_by_order():
    assert choose_candidate([figures(10, fa=76), figures(10, fa=79), figures(10, fa=79)], SFT) == 1


def test_without_an_eligible_one_the_best_sum():
    # 20 + 50 − 0 = 70, 70 + 60 − 40 = 90, 74 + 100 − 90 = 84
    assert choose_candidate([figures(0, 20, 50), figures(40, 70, 60), figures(90, 74, 100)], SFT) == 1


def test_a_base_without_a_benign_set():
    def bare(hs, fa):
        return {"hs": float(hs), "fa": float(fa)}

    assert choose_candidate([bare(0, 60), bare(30, 80)], bare(90, 80)) == 1


def test_every_candidate_is_reported():
    said = described("x:rho=1|2", ["x:rho=1", "x:rho=2"], [figures(0, fa=10), figures(20)], SFT)
    assert (said["entry"], said["chosen"]) == ("x:rho=1|2", "x:rho=2")
    assert [c["eligible"] for c in said["candidates"]] == [False, True]
    assert said["candidates"][0] == {"method": "x:rho=1", **figures(0, fa=10), "eligible": False}
