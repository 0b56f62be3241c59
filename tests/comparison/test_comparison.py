"""`panacea run` over methods: a small comparison in the tiny world, killed and resumed, and the numbers of its table."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from panacea_jax.comparison import cells, run
from panacea_jax.config import get_config
from panacea_jax.train.shared import Shared
from tests.reporting.folders import measured
from tests.runs import make_place, panacea

# ml_collections loads recipes with a method of importlib that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

RECIPE = Path(__file__).parents[2] / "configs" / "compare.py"
TABLES, REPORT = ("compare.json", "compare.csv", "compare.md"), ("index.html", "report.md", "report.csv", "report.parquet")
METHODS = ["sft", "panacea:rho=0.25,lam=0.2", "random_perturbation:rho=0.5"]


def stamps(root):
    return {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a comparison that was killed while it judged its third model, with what lay there then, and was started again."""
    root = tmp_path_factory.mktemp("compare") / "out"
    command = ("run", f"--config={RECIPE}:smoke", f"--workdir={root}")
    judged = []

    def kill_at_the_third(config, folder):
        judged.append(folder)
        if len(judged) == 3:
            raise KeyboardInterrupt
        return judge(config, folder)

    with pytest.MonkeyPatch.context() as patch:
        judge = cells.judge_stage
        patch.setattr(cells, "judge_stage", kill_at_the_third)
        assert panacea(*command) == 130
    before = stamps(root)
    assert not (root / "compare.json").exists()
    assert panacea(*command) == 0
    return root, before


def content(root):
    return json.loads((root / "compare.json").read_text())


def scores(root, method, ratio):
    slug = method.replace(":", "_").replace(",", "_")
    return json.loads((root / "cells" / slug / f"seed0-p{ratio:g}" / "scores.json").read_text())


def test_what_was_done_before_the_kill_is_not_done_again(finished):
    root, before = finished
    again = {p: stamp for p, stamp in stamps(root).items() if p in before and before[p] != stamp}
    assert not again, sorted(map(str, again))
    done = [p for p in before if p.name == "cell.json"]
    assert len(done) == 2  # aligned, and SFT at the first ratio


def test_a_third_start_runs_nothing(finished, capsys):
    root, _ = finished
    before = stamps(root)
    assert panacea("run", f"--config={RECIPE}:smoke", f"--workdir={root}") == 0
    changed = {p.name for p, stamp in stamps(root).items() if before.get(p) != stamp}
    assert {name for name in changed if not name.endswith(".svg")} == {*TABLES, *REPORT}
    out = capsys.readouterr().out
    assert all(method in out for method in METHODS) and out.strip().endswith("report/index.html")


def test_stages_in_common_are_run_once(finished):
    root, _ = finished
    assert [p.parent.name for p in root.glob("shared/seed0/*/align")] == ["sft"]
    tuned = sorted(str(p.relative_to(root / "shared")) for p in root.rglob("finetune") if "shared" in p.parts)  # fmt: skip
    wanted = [f"seed0/sft/p{p}/{m}/finetune" for p in ("0.1", "0.3") for m in ("panacea_rho=0.25_lam=0.2", "sft")]  # fmt: skip
    assert tuned == sorted(wanted)
    heal = root / "cells" / "random_perturbation_rho=0.5" / "seed0-p0.3"
    manifest = json.loads((heal / "heal" / "manifest.json").read_text())
    assert manifest["config"]["lora"]["init_from"].endswith("sft/p0.3/sft/finetune/adapter")
    ratios = {
        json.loads((root / "shared" / where / "manifest.json").read_text())["config"]["data"]["poison_ratio"]
        for where in wanted
    }  # fmt: skip
    assert ratios == {0.1, 0.3}


def test_the_table_is_what_the_cells_say(finished):
    root, _ = finished
    result = content(root)
    assert result["methods"] == METHODS and result["grid"] == []
    assert list(result["config"]["compare"]["methods"]) == METHODS[1:]  # what it was asked for, to ask for it again
    rows = {(r["method"], r["ratio"]): r for r in result["rows"]}
    assert list(rows) == [("aligned", None), *((m, p) for p in (0.1, 0.3) for m in METHODS)]
    lines = {
        (r["method"], r["ratio"]): r
        for r in csv.DictReader(io.StringIO((root / "compare.csv").read_text()))
    }
    for method in METHODS:
        for ratio in (0.1, 0.3):
            said, got = scores(root, method, ratio), rows[method, ratio]["figures"]
            wanted = {
                "hs": (said["hs"], said["ci95"]["hs"]),
                "hs_plus": (said["hs_plus"], said["ci95"]["hs_plus"]),
                "fa": (said["fa"]["pairs-test_user"], said["ci95"]["fa"]["pairs-test_user"]),
                "benign": (said["fa"]["pairs-test_benign"], said["ci95"]["fa"]["pairs-test_benign"]),
            }  # fmt: skip
            for figure, (value, interval) in wanted.items():
                assert got[figure]["mean"] == pytest.approx(value)
                assert got[figure]["ci95"] == pytest.approx(interval)
                assert float(lines[method, f"{ratio:g}"][f"{figure}_mean"]) == pytest.approx(value)


def test_costs_and_data(finished):
    root, _ = finished
    rows = {(r["method"], r["ratio"]): r for r in content(root)["rows"]}
    sft, ours, noise = (rows[method, 0.1] for method in METHODS)
    assert ours["steps"] == {"align": 3, "finetune": 3}
    assert ours["passes"] == {"align": 1.0, "finetune": 3.0}
    assert sft["passes_to_sft"] == 1.0 and ours["passes_to_sft"] == 2.0
    assert noise["passes_to_sft"] == 1.0 and noise["passes"]["heal"] == 0.0
    assert sft["time_to_sft"] == 1.0 and ours["time_to_sft"] > 0
    assert ours["whole_passes"] == {"align": 0.0, "finetune": 0.0}
    assert ours["step_bytes"]["finetune"] > sft["step_bytes"]["finetune"] > 0
    assert ours["step_bytes"]["align"] == sft["step_bytes"]["align"] > 0
    assert noise["step_bytes"].keys() == {"align", "finetune"}  # a method in one shot has no step
    assert ours["extra_data"] == ["harmful"] and sft["extra_data"] == noise["extra_data"] == []
    assert ours["against_sft"]["hs"]["n"] == 12 and sft["against_sft"] is None


def test_other_settings_are_refused_in_the_same_folder(finished, capsys):
    root, _ = finished
    flags = (f"--config={RECIPE}:smoke", "--config.train.steps=4", f"--workdir={root}")
    assert panacea("run", *flags) == 2
    assert "made by another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.compare.methods=('panacae',)", "config.compare.methods: 'panacae': 'panacae' is no defence"),
        ("--config.compare.methods=('panacea:rho=-1',)", "config.compare.methods: 'panacea:rho=-1': config.defence.rho = -1"),
        ("--config.compare.methods=('panacea:rho=big',)", "config.compare.methods: 'panacea:rho=big': config.defence.rho = big"),
        ("--config.compare.methods=('panacea:clamp=no',)", "config.compare.methods: 'panacea:clamp=no': config.defence.clamp"),
        ("--config.compare.seeds=(0,0)", "config.compare.seeds"),
        ("--config.compare.seeds=(-1,)", "config.compare.seeds"),
        ("--config.compare.ratios=(1.5,)", "config.compare.ratios"),
        ("--config.compare.ratios=()", "config.compare.ratios"),
        ("--config.compare.ratios=(0.1,0.1)", "config.compare.ratios = (0.1, 0.1): one is there twice"),
        ("--profile=1:2", "--profile=1:2: of the steps of one run"),
        ("--config.heal.methods=('random_prune',)", "config.heal.methods: in a comparison"),
        ("--config.compare.world=huge", "config.compare.world"),
        ("--config.compare.grid=('panacea:rho=1|2',)", "config.compare.development"),
        ("--config.compare.grid=('panacea:rho=1|2','vaccine:rho=1|2|3')", "the same number of candidates"),
        ("--config.heal.defence.name=random_perturbation", "config.heal.defence.name"),
        ("--config.align.defence.name=vaccine", "config.align.defence.name"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_before_anything_is_made(flag, message, tmp_path, capsys):
    assert panacea("run", f"--config={RECIPE}:smoke", flag, f"--workdir={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_reported_world_cannot_be_chosen_on(tmp_path, capsys):
    flags = ("--config.compare.grid=('panacea:rho=1|2',)", "--config.compare.development=(0,)")
    assert panacea("run", f"--config={RECIPE}:smoke", *flags, f"--workdir={tmp_path}") == 2
    assert "config.compare.development" in capsys.readouterr().err


def test_every_ratio_is_looked_at_before_anything_is_trained(tmp_path, capsys):
    """The second ratio leaves no record."""
    place = make_place(tmp_path / "place")
    flags = place.flags(
        "--config.compare.methods=('panacea',)", "--config.compare.ratios=(1.0, 0.25)", "--config.data.num_examples=1"
    )
    out = tmp_path / "out"
    assert panacea("run", *flags, f"--workdir={out}") == 2
    assert "config.data.num_examples=1 at poison_ratio=0.25 leaves no record" in capsys.readouterr().err
    assert not (out / "shared").exists()


@pytest.mark.parametrize(("given", "missing"), [("goals", "right answers"), ("user", "harmful prompts")])
def test_sets_to_choose_by_give_what_is_chosen_by(given, missing, tmp_path, capsys):
    place, out = make_place(tmp_path / "place"), tmp_path / "out"
    flags = ("--config.compare.grid=('random_perturbation:rho=0.1|5',)", "--config.compare.development=(1,)",
             f"--config.compare.validation=('{place.spec(given)}',)")  # fmt: skip
    assert panacea("run", *place.flags(*flags), f"--workdir={out}") == 2
    assert f"config.compare.grid: no set of config.compare.validation has {missing}" in capsys.readouterr().err
    assert not out.exists()


def test_before_is_measured_of_every_start(monkeypatch):
    """Of each seed that is a world, or is aligned here; of the one base of one's own once."""
    monkeypatch.setattr(run, "measure", lambda root, folder, judge: measured(1, 2, 1.0))
    monkeypatch.setattr(cells.Cells, "run", lambda self, cell: self.folder(cell))
    for world, aligns, seeds in (("tiny", False, [3, 4]), ("", True, [3, 4]), ("", False, [3])):
        config = get_config()
        config.compare.world = world
        found = run.measure_aligned(cells.Cells(config, Path("out"), aligns, Shared()), (3, 4), "refusal")
        assert list(found) == seeds


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A base with its sources, and an adapter on it that was made elsewhere."""
    root = tmp_path_factory.mktemp("adapted")
    place = make_place(root / "place")
    made = root / "made"
    flags = place.flags(
        "--config.defence.name=sft", "--config.train.steps=2", "--config.data.attack="
    )
    assert panacea("align", *flags, f"--workdir={made}") == 0
    return place, made / "align" / "adapter"


def unaligned(adapted, out, method, *flags):
    """A comparison without an alignment stage that starts from an adapter; the folder of the method's only cell."""
    place, adapter = adapted
    flags = place.flags(
        f"--config.compare.methods=('{method}',)", "--config.compare.ratios=(0.25,)", f"--config.lora.init_from={adapter}",
        "--config.train.steps=2", *flags,
    )  # fmt: skip
    assert panacea("run", *flags, f"--workdir={out}") == 0
    [folder] = out.glob(f"cells/{method.partition(':')[0]}*/seed0-p0.25")
    return folder


def heal_manifest(folder):
    return json.loads((folder / "heal" / "manifest.json").read_text())


def test_a_given_adapter_is_merged_once_and_for_every_stage(adapted, tmp_path):
    """Without an alignment stage too, heal and the answers stand on the base that the fine-tuned adapter belongs to."""
    folder = unaligned(
        adapted, tmp_path, "random_perturbation:rho=0.1", "--config.lora.policy=merged"
    )
    [merged] = tmp_path.rglob("base/model")
    heal = heal_manifest(folder)
    assert heal["config"]["model"]["path"] == heal["outcome"]["base"] == str(merged)
    [answers] = folder.glob("generations/**/manifest.json")
    assert json.loads(answers.read_text())["config"]["model"]["path"] == str(merged)
    tuned = json.loads(next(tmp_path.glob("shared/**/finetune/manifest.json")).read_text())
    assert tuned["config"]["lora"]["init_from"] == "" and tuned["outcome"]["base"] == str(merged)


@pytest.mark.parametrize("policy", ["single", "merged"])
def test_safe_lora_takes_a_given_adapter_for_what_aligned(adapted, policy, tmp_path):
    place, adapter = adapted
    folder = unaligned(adapted, tmp_path, "safelora:num_layers=1", f"--config.lora.policy={policy}")
    defence = heal_manifest(folder)["config"]["defence"]
    assert defence["aligned"] == (str(adapter) if policy == "single" else "")
    assert defence["base"] == str(place.base)


def test_a_grid_on_a_base_of_ones_own(tmp_path):
    """Without a world: the configuration's base and data, alignment by Vaccine for one method, a choice on a set of its own."""
    place = make_place(tmp_path / "place")
    flags = place.flags(
        "--config.compare.methods=('vaccine',)", "--config.compare.grid=('random_perturbation:rho=0.1|5',)",
        "--config.compare.development=(1,)", f"--config.compare.validation=('{place.spec('goals')}', '{place.spec('user')}')",
        "--config.train.steps=2", "--config.align.train.steps=2", "--config.align.train.batch_size=4", "--config.data.attack=",
    )  # fmt: skip
    out = tmp_path / "out"
    assert panacea("run", *flags, f"--workdir={out}") == 0
    result = content(out)
    [choice] = result["grid"]
    assert choice["chosen"] in [c["method"] for c in choice["candidates"]]
    assert result["methods"] == ["sft", "vaccine", choice["chosen"]]
    assert {p.name for p in (out / "shared" / "seed0").iterdir()} == {"sft", "vaccine"}
    assert result["guard"] == {}  # of worlds only
    for candidate in choice["candidates"]:
        folder = (
            out / "development" / "cells" / candidate["method"].replace(":", "_") / "seed1-p0.25"
        )
        said = json.loads((folder / "scores.json").read_text())
        assert candidate["hs"] == pytest.approx(said["hs"])
        assert np.isclose(candidate["fa"], said["fa"]["pairs"])
