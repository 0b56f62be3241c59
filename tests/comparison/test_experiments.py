"""The recipe `experiments` through `panacea run` at toy size: every variant ends in a report with the pictures that it is there for."""

import json
from pathlib import Path

import pytest

from tests.runs import panacea

# ml_collections loads recipes with a method of importlib that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

RECIPE = Path(__file__).parents[2] / "configs" / "experiments.py"
TINY = (
    "--config.compare.world=tiny", "--config.compare.seeds=(0,)", "--config.data.num_examples=40",
    "--config.align.train.steps=2", "--config.align.train.log_every=1", "--config.train.log_every=1",
)  # fmt: skip


def experiment(variant, out, methods, *flags):
    """Run it with these methods; the pictures of its report by name, and the content of compare.json."""
    command = (f"--config={RECIPE}:{variant}", *TINY, f"--config.compare.methods={methods!r}", *flags)
    assert panacea("run", *command, f"--workdir={out}") == 0
    report = out / "report"
    assert "</html>" in (report / "index.html").read_text("utf-8")
    drawn = {path.stem: path.read_text("utf-8") for path in (report / "figures").glob("*.svg")}
    return drawn, json.loads((out / "compare.json").read_text())


def test_epochs_are_an_axis_without_training_again(tmp_path):
    drawn, _ = experiment("epochs", tmp_path, ("panacea:rho=0.25,lam=0.2",), "--config.train.epochs=2")
    assert {"epochs_hs", "epochs_fa", "epochs_benign", "curve_loss", "hs_fa"} <= drawn.keys()
    assert "panacea" in drawn["epochs_hs"] and "sft" in drawn["epochs_hs"]
    tuned = list(tmp_path.glob("shared/**/finetune"))
    assert len(tuned) == 2 and all((folder / "loss.png").is_file() for folder in tuned)
    for path in tmp_path.glob("cells/*/*/curve.json"):
        assert [point["epoch"] for point in json.loads(path.read_text())["points"]] == [1, 2]


def test_rho_and_lambda_are_a_map_with_noise_beside_it(tmp_path):
    grid = tuple(f"panacea:rho={rho},lam={lam}" for rho in (0.1, 1) for lam in (1e-3, 1e-2))
    noise = tuple(f"random_perturbation:rho={rho}" for rho in (0.1, 1))
    drawn, _ = experiment("rho_lambda", tmp_path, grid + noise, "--config.train.steps=2")
    assert {"map_hs", "map_fa", "map_benign", "hs_fa", "hs_benign", "over_hs"} <= drawn.keys()
    assert "random_perturbation" in drawn["over_hs"] and "panacea" not in drawn["over_hs"]


def test_layers_are_of_several_architectures(tmp_path):
    worlds = ("tiny", "tiny_qwen3", "tiny_gemma")
    drawn, result = experiment(
        "layers", tmp_path, ("panacea:rho=0.25,lam=0.2",), f"--config.compare.vary=('compare.world={'|'.join(worlds)}',)",
        "--config.train.steps=2",
    )  # fmt: skip
    assert {"layers_last", "layers_mean"} <= drawn.keys() and all(f"compare.world={world}" in drawn["layers_mean"] for world in worlds)
    before = [row for row in result["rows"] if row["ratio"] is None]
    assert [row["setting"] for row in before] == [f"compare.world={world}" for world in worlds]
    assert result["guard"].keys() == {f"0 compare.world={world}" for world in worlds}
    # Each base has its own alignment, and what starts from it is of its kind; the records are the same.
    kinds, records = set(), set()
    for world, folder in zip(worlds, ("0", "0-tiny_qwen3", "0-tiny_gemma")):
        records.add((tmp_path / "worlds" / folder / "data" / "user.jsonl").read_bytes())
        [align] = tmp_path.glob(f"shared/seed0/*world={world}/align/manifest.json")
        base = json.loads(align.read_text())["config"]["model"]["path"]
        kinds.add(json.loads((Path(base) / "config.json").read_text())["model_type"])
        for tuned in tmp_path.glob(f"shared/seed0/*world={world}/p0.1/*/*/finetune/manifest.json"):
            assert json.loads(tuned.read_text())["config"]["model"]["path"] == base
    assert kinds == {"llama", "qwen3", "gemma"} and len(records) == 1
    assert "Order of the layers' shares" in (tmp_path / "report" / "report.md").read_text("utf-8")


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    out = tmp_path_factory.mktemp("masks")
    methods = tuple(f"{name}:dense_ratio={ratio}" for name in ("antidote", "random_prune", "magnitude_prune") for ratio in (0.125, 0.5))
    return out, *experiment("masks", out, methods, "--config.train.steps=2")


def test_masks_of_as_many_entries_share_a_picture(masked):
    out, drawn, _ = masked
    assert {"over_hs", "over_fa", "over_benign", "hs_fa"} <= drawn.keys()
    assert all(name in drawn["over_hs"] for name in ("antidote", "random_prune", "magnitude_prune"))
    for ratio in (0.125, 0.5):
        cut = {name: json.loads(next(out.glob(f"cells/{name}_dense_ratio={ratio}/*/heal/manifest.json")).read_text())["outcome"]["report"]
               for name in ("antidote", "random_prune", "magnitude_prune")}  # fmt: skip
        assert len({json.dumps(counts, sort_keys=True) for counts in cut.values()}) == 1, cut


def test_learning_rate_and_epochs_are_a_map_of_each_method(tmp_path):
    vary = ("optimizer.learning_rate=2e-4|2e-3", "train.epochs=1|2")
    drawn, _ = experiment("learning_rates", tmp_path, ("random_prune:dense_ratio=0.25",), f"--config.compare.vary={vary!r}")
    assert {"map_hs", "map_fa", "map_hs_2", "map_fa_2"} <= drawn.keys()
    assert len(list(tmp_path.glob("shared/**/finetune/manifest.json"))) == 4  # pruning starts from SFT's
