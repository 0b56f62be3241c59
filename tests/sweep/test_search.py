"""Sweeps that Optuna leads."""

import pytest

from panacea_jax.errors import InputError
from panacea_jax.sweep.run import list_runs
from tests.sweep.test_sweep import SPACE, begun, swept
from tests.sweep.worker import recorded, settings

optuna = pytest.importorskip("optuna")


def study(workdir):
    journal = optuna.storages.journal.JournalFileBackend(str(workdir / "study.journal"))
    return optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(journal))


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_search_that_is_cut_short_goes_on_as_if_it_had_not_been(sampler, tmp_path):
    keys = {"over": SPACE, "sampler": sampler, "trials": 12}
    whole = swept(tmp_path / "whole", runner=_noted(tmp_path / "whole"), **keys)
    run, left = recorded(tmp_path / "log"), iter([False] * 5 + [True] + [False] * 20)

    def cut(config, folder):
        found = run(config, folder)
        if next(left):
            raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path, runner=cut, **keys)
    assert [t.state.name for t in study(tmp_path).trials] == ["COMPLETE"] * 5 + ["RUNNING"]
    again = swept(tmp_path, runner=cut, **keys)
    assert [r["setting"] for r in again["rows"]] == [r["setting"] for r in whole["rows"]]
    assert begun(tmp_path)[5] == begun(tmp_path)[6] and len(set(begun(tmp_path))) == len(begun(tmp_path)) - 1
    trials = study(tmp_path).trials
    figures = {tuple(r["setting"].values()): [r["figures"][f]["mean"] for f in ("hs", "fa")] for r in again["rows"]}
    assert len(trials) == 12 and [t.values for t in trials] == [figures[tuple(t.params.values())] for t in trials]
    swept(tmp_path, **keys | {"trials": 13})
    assert len(study(tmp_path).trials) == 13


def _noted(workdir):
    workdir.mkdir()
    return recorded(workdir / "log")


def test_tpe_finds_what_random_draws_do_not(tmp_path):
    """One objective with its optimum inside the range: of the later trials most lie near it."""

    def runner(config, folder):
        return {"figures": {"hs": {"value": 100 * abs(config.defence.rho - 1.7), "ci95": [0.0, 1.0]}}}

    keys = {"over": ("defence.rho=0..10",), "objectives": ("hs",), "trials": 30}
    rhos = [r["setting"]["defence.rho"] for r in swept(tmp_path, runner=runner, sampler="tpe", **keys)["rows"]]
    assert sum(abs(rho - 1.7) < 1 for rho in rhos[-10:]) > 5 > sum(abs(rho - 1.7) < 1 for rho in rhos[:10])


def test_a_setting_that_is_drawn_again_is_not_run_again(tmp_path):
    rows = swept(tmp_path, over=("seed=0,1", "defence.lam=1e-3,1e-2"), sampler="tpe", trials=12)["rows"]
    assert len(begun(tmp_path)) == len(set(begun(tmp_path))) <= 4 and len(study(tmp_path).trials) == 12
    assert sum(len(row["folders"]) for row in rows) == len(begun(tmp_path))


def test_failures_are_told_to_the_study(tmp_path):
    def runner(config, folder):
        if config.defence.lam > 1e-3:
            raise InputError("too much")
        return recorded(tmp_path / "log")(config, folder)

    rows = swept(tmp_path, runner=runner, over=SPACE, sampler="tpe", trials=10)["rows"]
    failed = [row["status"] == "failed" for row in rows]
    assert any(failed) and [t.state.name == "FAIL" for t in study(tmp_path).trials] == failed


def test_a_study_of_another_sweep_is_refused(tmp_path):
    swept(tmp_path, over=SPACE, sampler="tpe", trials=2)
    with pytest.raises(InputError, match=r"study.journal: of another sweep \(over"):
        swept(tmp_path, over=SPACE[:2], sampler="tpe", trials=3)
    with pytest.raises(InputError, match="decides as it goes"):
        list_runs(settings(over=SPACE, sampler="tpe", trials=2))


def test_a_combination_that_cannot_be_counts_as_failed_and_the_search_goes_on(tmp_path, capsys):
    """Plain SFT has no ρ."""
    rows = swept(tmp_path, over=("defence.name=panacea,sft", "defence.rho=0.5..1"), sampler="tpe", trials=10)["rows"]
    trials = study(tmp_path).trials
    assert len(trials) == 10 and {t.params["defence.name"]: t.state.name for t in trials} == {"panacea": "COMPLETE", "sft": "FAIL"}
    assert [row["setting"] for row in rows] == [t.params for t in trials if t.state.name == "COMPLETE"]
    assert "counts as failed: config.sweep.over: defence.name=sft" in capsys.readouterr().err


def test_a_search_that_draws_nothing_possible_says_so(tmp_path):
    names = "defence.name=panacea,sft,kl,ewc,vlguard,sbr,constrained_sft,bds"
    with pytest.raises(InputError, match="no combination that was drawn is a possible configuration"):
        swept(tmp_path, over=(names, "defence.rho=0.5..1"), sampler="tpe", trials=1)
