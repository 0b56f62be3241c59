"""Where the seconds of a stage went: each counted once, over all calls of a run that was stopped."""

import json
import time

import pytest

from panacea_jax.train import goodput
from panacea_jax.train.goodput import PARTS, Goodput, shares
from tests.runs import finished_run


def test_each_second_counts_once(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
    spent = Goodput()

    def items():
        for item in "ab":
            now[0] += 2
            yield item

    now[0] += 1
    for _ in spent.waiting("data", items()):
        with spent("step"):
            now[0] += 10
            with spent("save"):
                now[0] += 3
            now[0] += 5
    with pytest.raises(KeyError), spent("evaluate"):
        now[0] += 4
        raise KeyError
    now[0] += 1
    assert spent.seconds() == {"compile": 0, "data": 4, "step": 30, "save": 6, "evaluate": 4, "other": 2}
    spent.restore({"seconds": {"step": 100.0, "compile": 7.0}})
    assert spent.seconds()["step"] == 130 and spent.seconds()["compile"] == 7
    spent.restore({})  # of a checkpoint from before


def test_shares():
    assert shares({"step": 6.1, "compile": 3.0, "save": 0.9, "data": 0.01}) == "step 61 %, compile 30 %, save 9 %"
    assert shares({}) == "" and shares(dict.fromkeys(PARTS, 0.0)) == ""


def test_a_run_says_what_its_stages_took(tmp_path_factory):
    """In the manifests and in the summary; what was counted is no more than what the phase took."""
    _, workdir = finished_run(tmp_path_factory)
    phases = json.loads((workdir / "summary.json").read_text())["phases"]
    for name in ("align", "finetune", "heal"):
        outcome = json.loads((workdir / name / "manifest.json").read_text())["outcome"]
        assert phases[name]["spent"] == outcome["seconds"] and list(outcome["seconds"]) == sorted(PARTS)
        assert 0 < sum(outcome["seconds"].values()) <= phases[name]["seconds"]
        assert phases[name]["peak_bytes"] >= outcome["peak_bytes"] > 50 * 2**20 and outcome["peak_of"] == "process"
    trained = phases["finetune"]["spent"]
    assert trained["compile"] > trained["data"] and min(trained["compile"], trained["step"], trained["save"], trained["other"]) > 0
    assert phases["heal"]["spent"]["compile"] == 0  # a method without steps


def test_the_clock_of_the_wall_is_not_asked(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: pytest.fail("asked"))
    spent = Goodput()
    with spent("step"):
        pass
    assert min(spent.seconds().values()) >= 0
