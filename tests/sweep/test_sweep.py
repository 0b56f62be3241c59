"""What a sweep runs, notes and chooses, with runs that cost nothing."""

import csv
import json
import sys

import pytest

from panacea_jax.errors import InputError, OutOfMemory
from panacea_jax.sweep import plan
from panacea_jax.sweep.plan import make_run, plan_runs
from panacea_jax.sweep.run import list_runs, sweep
from tests.runs import rewrite_manifest
from tests.sweep.worker import figures, recorded, settings

RHOS, LAMS, SEEDS = (0.1, 2.0, 5.0), (1e-4, 1e-2), (0, 1)
GRID = ("defence.rho=0.1,2,5", "defence.lam=1e-4..1e-2:log2", "seed=0..1")
SPACE = ("defence.rho=0.1..5:log", "defence.lam=1e-4,1e-3,1e-2", "train.epochs=1..9")


def begun(workdir):
    """Names of the runs in the order in which they began."""
    lines = (workdir / "log").read_text().splitlines()
    return [line.split()[1] for line in lines if line.startswith("begin")]


def swept(workdir, index=0, runner=None, **keys):
    """The content of sweep.json."""
    path = sweep(settings(**keys), workdir, index, runner or recorded(workdir / "log"))
    assert path == workdir / "sweep.json"
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("grid")
    return workdir, swept(workdir, over=GRID)


def test_a_grid_has_every_combination_once_the_last_axis_fastest(grid):
    workdir, result = grid
    assert [list(row["setting"].values()) for row in result["rows"]] == [[rho, lam] for rho in RHOS for lam in LAMS]
    assert len(begun(workdir)) == len(set(begun(workdir))) == 12
    assert sorted(p.name for p in (workdir / "runs").iterdir() if p.is_dir()) == sorted(begun(workdir))
    config = settings()
    config.defence.rho, config.defence.lam, config.seed = 2.0, 1e-4, 1
    place = next(r for r in result["rows"] if list(r["setting"].values()) == [2.0, 1e-4])["folders"]["1"]
    manifest = json.loads((workdir / place / "manifest.json").read_text())
    assert manifest["status"] == "done" and manifest["outcome"]["figures"] == figures(config)
    assert manifest["config"]["finetune"]["defence"]["rho"] == 2.0


def test_rows_are_means_over_seeds_and_the_best_is_by_the_rule(grid):
    workdir, result = grid
    mean_seed = sum(SEEDS) / len(SEEDS)
    for row in result["rows"]:
        rho, lam = row["setting"].values()
        assert row["figures"]["hs"]["mean"] == pytest.approx(90 / (1 + rho) + mean_seed)
        assert row["figures"]["fa"]["mean"] == pytest.approx(60 - 8 * rho - 1000 * lam - mean_seed)
        assert row["passes"] == 60 and row["step_bytes"] == 2**20 and row["step_seconds"] == 2
        low, high = row["figures"]["hs"]["ci95"]
        assert low < row["figures"]["hs"]["mean"] < high and high - low < 3  # over seeds: narrower than a run's own ±5
        # λ costs FA alone, ρ trades both, so the smallest λ of each ρ is beaten by none
        assert row["front"] == (lam == min(LAMS))
    gains = {tuple(r["setting"].values()): r["figures"]["fa"]["mean"] - r["figures"]["hs"]["mean"] for r in result["rows"]}
    assert [tuple(r["setting"].values()) for r in result["rows"] if r["best"]] == [max(gains, key=gains.get)] == [(2.0, 1e-4)]
    assert result["rule"] == "the highest FA − HS, in points; of equals the first"
    with (workdir / "sweep.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["hs_mean"]) for line in lines] == [r["figures"]["hs"]["mean"] for r in result["rows"]]
    assert [line["best"] for line in lines].count("True") == 1


def test_what_is_done_is_not_run_again_and_what_is_added_is(grid, tmp_path):
    workdir, _ = grid
    before = begun(workdir)
    swept(workdir, over=("defence.rho=0.1,2,5", "defence.lam=1e-4,1e-2", "seed=0..1"))  # written otherwise
    assert begun(workdir) == before
    swept(tmp_path, over=("defence.rho=1,2",))
    swept(tmp_path, over=("defence.rho=2,3,1",))
    assert len(begun(tmp_path)) == len(set(begun(tmp_path))) == 3


def name(**changes):
    config = settings()
    config.update_from_flattened_dict(changes)
    return make_run(config, ()).name


def test_a_folder_is_called_by_what_decides():
    same = [{"generate.batch_size": 7}, {"mesh.tensor": 2}, {"train.log_every": 3}, {"model.attention": "xla"}, {"align.train.epochs": 3}]
    other = [
        {"seed": 1}, {"defence.rho": 0.3}, {"eval.num_examples": 5}, {"judge.name": "refusal_sentences"}, {"align.defence.name": "sft"},
        {"generate.max_new_tokens": 9}, {"eval.every": 5}, {"heal.defence.name": "random_perturbation", "heal.defence.rho": 1.0},
    ]  # fmt: skip
    assert {name(**changes) for changes in same} == {name()}
    assert len({name(), *(name(**changes) for changes in other)}) == 1 + len(other)


def test_a_folder_of_another_configuration_is_an_error(tmp_path):
    keys = {"over": ("defence.rho=0.5,1",)}
    swept(tmp_path, **keys)
    stage = tmp_path / "runs" / begun(tmp_path)[1]
    config = json.loads((stage / "manifest.json").read_text())["config"]
    config["finetune"]["defence"]["rho"] = 7.0
    rewrite_manifest(stage, config=config)
    with pytest.raises(InputError, match=r"made by another run \(config finetune.defence.rho: 7.0 there, 1.0 now\)"):
        swept(tmp_path, **keys)


def test_runs_that_are_one_are_refused(tmp_path):
    with pytest.raises(InputError, match="train.log_every=1 and train.log_every=2 are one run"):
        swept(tmp_path, over=("train.log_every=1,2",))
    with pytest.raises(InputError, match="defence.name=sft,defence.rho=1.0: .*sft has no rho"):
        swept(tmp_path, over=("defence.name=panacea,sft", "defence.rho=1,2"))
    assert not (tmp_path / "runs").exists()


def test_a_methods_own_defaults_follow_its_name(tmp_path):
    """ρ of the base is Panacea's default, which is nothing that plain SFT was told."""
    runs = plan_runs(settings(over=("defence.name=sft,panacea,vaccine",)))
    assert [run.decisive["finetune"]["defence"].get("rho") for run in runs] == [None, 1.0, 2.0]


def failing(workdir, *rhos):
    run = recorded(workdir / "log")

    def runner(config, folder):
        if config.defence.rho in rhos:
            raise InputError(f"rho {config.defence.rho} is too much")
        return run(config, folder)

    return runner


def test_a_run_that_fails_is_noted_and_the_others_go_on(tmp_path, capsys):
    keys = {"over": ("defence.rho=0.5,1,2", "seed=0,1")}
    rows = swept(tmp_path, runner=failing(tmp_path, 1.0), **keys)["rows"]
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert rows[1]["error"] == "rho 1.0 is too much" and "figures" not in rows[1] and "best" not in rows[1]
    assert "Failed: " in capsys.readouterr().out and len(begun(tmp_path)) == 4
    swept(tmp_path, **keys)
    assert len(begun(tmp_path)) == 4  # it stays failed until its folder is gone
    for place in rows[1]["folders"].values():
        (tmp_path / place / "manifest.json").unlink()
    assert [row["status"] for row in swept(tmp_path, **keys)["rows"]] == ["done"] * 3


def test_a_run_that_does_not_fit_the_memory_is_noted_too(tmp_path, capsys):
    def runner(config, folder):
        if config.defence.rho == 1.0:
            raise OutOfMemory("finetune: out of memory \x1b[2J")
        return recorded(tmp_path / "log")(config, folder)

    rows = swept(tmp_path, runner=runner, over=("defence.rho=1,2",))["rows"]
    assert [row["status"] for row in rows] == ["failed", "done"] and rows[0]["error"].startswith("finetune: out of memory")
    said = capsys.readouterr()
    assert r"out of memory \x1b[2J" in said.out and "\x1b" not in said.out + said.err


def test_a_sweep_of_failures_is_one(tmp_path):
    with pytest.raises(InputError, match=r"every run of the sweep failed, the first by: rho 0.5"):
        swept(tmp_path, runner=failing(tmp_path, 0.5, 1.0), over=("defence.rho=0.5,1",))


def test_one_run_by_its_number(tmp_path):
    keys = {"over": ("defence.rho=0.5,1,2",)}
    rows = swept(tmp_path, index=2, **keys)["rows"]
    assert [row["status"] for row in rows] == ["waiting", "done", "waiting"]
    assert list_runs(settings(**keys)) == ["defence.rho=0.5", "defence.rho=1.0", "defence.rho=2.0"]
    with pytest.raises(InputError, match="--index=4: 1 … 3"):
        swept(tmp_path, index=4, **keys)


def test_random_draws_are_in_the_space_different_and_begin_with_the_same():
    runs = plan_runs(settings(over=SPACE, sampler="random", trials=20))
    rhos, lams, epochs = zip(*([value for _, value in run.setting] for run in runs))
    assert len({run.name for run in runs}) == 20
    assert [run.setting for run in plan_runs(settings(over=SPACE, sampler="random", trials=3))] == [run.setting for run in runs[:3]]
    assert min(rhos) >= 0.1 and max(rhos) <= 5 and set(lams) == {1e-4, 1e-3, 1e-2} and set(epochs) <= set(range(1, 10))
    assert 5 <= sum(rho < 0.5**0.5 for rho in rhos) <= 15  # half of them, since they are drawn evenly in the logarithm


def test_random_draws_of_too_few_points_are_refused(monkeypatch):
    monkeypatch.setattr(plan, "PATIENCE", 5)
    with pytest.raises(InputError, match="there are 2 different runs only"):
        plan_runs(settings(over=("seed=0,1",), sampler="random", trials=3))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sweep.over": ()}, "config.sweep.over is empty"),
        ({"eval.tasks": ()}, "config.eval.tasks is empty"),
        ({"eval.tasks": ("pairs@test.jsonl",)}, "config.sweep.objectives: hs: no set of config.eval.tasks"),
        ({"sweep.objectives": ("hs", "benign")}, "config.sweep.objectives: benign: no set of config.eval.tasks"),
        ({"compare.methods": ("sft",)}, "a comparison has axes of its own"),
    ],
)
def test_what_is_no_sweep_is_refused(changed, said, tmp_path):
    config = settings()
    config.update_from_flattened_dict(changed)
    with pytest.raises(InputError, match=said):
        sweep(config, tmp_path / "out", runner=recorded(tmp_path / "log"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keys", [{"over": ("seed=0,1",)}, {"over": SPACE, "sampler": "tpe", "trials": 2}])
def test_a_folder_that_cannot_be_made_is_named(keys, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/out.*: cannot be written \(Not a directory\)"):
        sweep(settings(**keys), tmp_path / "file" / "out", runner=recorded(tmp_path / "log"))


def test_without_optuna_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"needs Optuna; pip install 'panacea_jax\[sweep\]'"):
        swept(tmp_path, over=SPACE, sampler="tpe", trials=2)
