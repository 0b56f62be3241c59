"""`config.compare.vary` through `panacea run`: what is trained how often, and what the table says of it."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.runs import make_place, panacea

VARY = "--config.compare.vary=('optimizer.learning_rate=0.001|0.05', 'data.num_harmful=2|0')"


def command(place, out, *flags):
    few = ("--config.compare.ratios=(0.25,)", "--config.train.steps=2", f"--config.eval.tasks=('{place.spec('goals')}',)")
    return panacea("run", *place.flags(*few, *flags), f"--workdir={out}")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    root = tmp_path_factory.mktemp("swept")
    place = make_place(root / "place")
    flags = ("--config.compare.methods=('antidote',)", VARY)
    assert command(place, root / "out", *flags) == 0
    return place, root / "out", flags


def test_sft_is_not_run_for_each_harmful_set(swept):
    """It reads none; both methods' fine-tuning is plain, and that is run once for each learning rate."""
    _, out, _ = swept
    assert len(list(out.glob("cells/sft/*/cell.json"))) == 2
    assert len(list(out.glob("cells/antidote/*/cell.json"))) == 4
    notes = [json.loads(p.read_text())["setting"] for p in out.glob("cells/antidote/*/cell.json")]
    assert {(n["optimizer.learning_rate"], n["data.num_harmful"]) for n in notes} == {
        (r, n) for r in (0.001, 0.05) for n in (2, 0)
    }
    tuned = list(out.glob("shared/seed0/unaligned/p0.25/*/sft/finetune/manifest.json"))
    assert len(tuned) == 2
    for path in tuned:
        config = json.loads(path.read_text())["config"]
        assert f"learning_rate={config['optimizer']['learning_rate']}" in path.parts[-4]


def test_cells_that_fine_tuning_left_have_curves(tmp_path):
    place = make_place(tmp_path / "place")
    flags = ("--config.compare.methods=('antidote',)", "--config.eval.every=1")
    assert command(place, tmp_path / "out", *flags) == 0
    [curve] = (tmp_path / "out").rglob("curve.json")
    assert curve.parts[-3:-1] == ("sft", "seed0-p0.25")  # Antidote's cell is what it made of the same fine-tuning
    points = json.loads(curve.read_text())["points"]
    scores = json.loads((curve.parent / "scores.json").read_text())
    assert [p["step"] for p in points] == [1, 2] and points[1]["hs"] == scores["hs"]


def test_the_table_has_every_setting_and_the_worst(swept):
    _, out, _ = swept
    result = json.loads((out / "compare.json").read_text())
    rows = [r for r in result["rows"] if r["ratio"] is not None]
    assert [(r["method"], r["setting"]) for r in rows][:3] == [
        ("sft", "optimizer.learning_rate=0.001,data.num_harmful=2"),
        ("antidote", "optimizer.learning_rate=0.001,data.num_harmful=2"),
        ("sft", "optimizer.learning_rate=0.001,data.num_harmful=0"),
    ]
    assert len(rows) == 8
    for found in result["worst"]:
        values = [r["figures"]["hs"]["mean"] for r in rows if r["method"] == found["method"]]
        assert found["hs"]["worst"] == max(values) and len(found["hs"]["cumulative"]) == 4
    with (out / "compare.csv").open(newline="") as file:
        lines = [line["setting"] for line in csv.DictReader(file) if line["ratio"]]
    assert lines == [r["setting"] for r in rows]
    text = (out / "compare.md").read_text()
    assert "| method | p | setting | HS |" in text and "| method | p | worst HS | at |" in text


def test_settings_can_be_added_and_nothing_is_run_again(swept):
    place, out, flags = swept
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert command(place, out, *flags) == 0
    changed = {p.name for p, stamp in before.items() if p.exists() and p.stat().st_mtime_ns != stamp and "report" not in p.parts}
    assert changed == {"compare.json", "compare.csv", "compare.md", "compare.png"}
    assert (out / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_what_changed_under_its_name_is_not_mixed_with_what_was_made_before(swept, capsys, monkeypatch):
    place, out, flags = swept
    for path in (place.root / "user.jsonl", place.root / "goals.jsonl", place.base / "config.json"):
        before = path.read_bytes()
        path.write_bytes(before + (b"\n" if path.suffix == ".json" else before))
        try:
            assert command(place, out, *flags) == 2, path
        finally:
            path.write_bytes(before)
        error = capsys.readouterr().err
        assert f"made by another run (input {place.base if path.suffix == '.json' else place.spec(path.stem)}: " in error
    with monkeypatch.context() as patch:
        patch.setattr("panacea_jax.comparison.cells.make_judge", lambda config: SimpleNamespace(name="refusal", version="99"))
        assert command(place, out, *flags) == 2
    assert "of the judge, not 99; move its judgements and its cell.json away" in capsys.readouterr().err
    rows = ("--config.generate.batch_size=2", "--config.judge.batch_size=3")  # how many are computed together decides nothing
    assert command(place, out, *flags, *rows) == 0


def test_further_fine_tuning_shares_all_that_was_before(tmp_path):
    """Healed once, fine-tuned further from there, at a poison ratio of its own."""
    place, out = make_place(tmp_path / "place"), tmp_path / "out"
    flags = ("--config.compare.methods=('random_perturbation:rho=0.1',)",
             "--config.compare.vary=('after.steps=0|1|3', 'after.poison_ratio=0.5')")  # fmt: skip
    assert command(place, out, *flags) == 0
    heals = list(out.rglob("heal/manifest.json"))
    assert len(heals) == 1 and len(list(out.glob("shared/**/finetune/manifest.json"))) == 1
    further = {}
    for path in out.glob("cells/random*/*/after/finetune/manifest.json"):
        config = json.loads(path.read_text())["config"]
        assert config["lora"]["init_from"] == str(heals[0].parent / "adapter")
        assert config["defence"]["name"] == "sft" and config["data"]["poison_ratio"] == 0.5
        further[config["train"]["steps"]] = path
    assert set(further) == {1, 3}
    answers = json.loads((further[3].parents[2] / "generations" / "manifest.json").read_text())
    assert answers["config"]["adapter"] == str(further[3].parent / "adapter")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config.compare.vary=('train.steps=-1',)",), "config.compare.vary: config.train.steps = -1"),
        (("--config.compare.vary=('lora.rank=2|4',)", "--config.align.defence.name=sft"), "config.lora.policy = merged"),
        (("--config.compare.vary=('data.user=pairs@none.jsonl',)",), "none.jsonl"),
        (("--config.compare.methods=()", "--config.compare.vary=('train.steps=1',)"), "config.compare.vary"),
        (("--config.compare.methods=()", "--config.after.steps=1"), "config.after.steps = 1"),
        (("--config.after.poison_ratio=2",), "config.after.poison_ratio = 2"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_before_anything_is_made(flags, message, tmp_path, capsys):
    place = make_place(tmp_path / "place")
    methods = () if any("methods" in flag for flag in flags) else ("--config.compare.methods=('antidote',)",)
    assert command(place, tmp_path / "out", *methods, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ("realign", "sft, or one method of the stage heal that has no steps"),
        ("panacea", "sft, or one method of the stage heal that has no steps"),
        ("unlearn:rho=-1", "config.after.attack: 'unlearn:rho=-1': config.defence.rho = -1"),
        ("unlearn:rho=1|2", "alternatives with |"),
        ("unlearn", "config.after.steps = 3: unlearn has no steps"),
    ],
)
def test_bad_attacks(attack, message, tmp_path, capsys):
    place = make_place(tmp_path / "place")
    flags = ("--config.compare.methods=('sft',)", f"--config.after.attack={attack}", "--config.after.steps=3")
    assert command(place, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err


def test_unlearning_and_noise_after_all_defences(tmp_path):
    """Each in a folder of its own beside the answers, from what Panacea deployed; its norm is what was asked for."""
    place, out = make_place(tmp_path / "place"), tmp_path / "out"
    flags = ("--config.compare.methods=('panacea:rho=0.5,lam=0.3',)",
             "--config.compare.vary=('after.attack=unlearn:rho=0.25|random_perturbation:rho=0.25',)")  # fmt: skip
    assert command(place, out, *flags) == 0
    [tuned] = out.glob("shared/**/panacea*/finetune/adapter/adapter_model.safetensors")
    w = load_file(tuned)
    found = {}
    for path in out.glob("cells/panacea*/*/after/heal/adapter/adapter_model.safetensors"):
        moved = {n: x - w[n] for n, x in load_file(path).items()}
        assert np.sqrt(sum((x**2).sum() for x in moved.values())) == pytest.approx(0.25, rel=1e-4)
        found[json.loads((path.parents[1] / "manifest.json").read_text())["config"]["defence"]["name"]] = moved
    assert set(found) == {"unlearn", "random_perturbation"}
    result = json.loads((out / "compare.json").read_text())
    row = next(r for r in result["rows"] if r["method"].startswith("panacea"))
    assert set(row["steps"]) == {"finetune"} and row["extra_data"] == ["harmful"]  # the attack is none of its costs


def test_attacks_are_compared_and_bounded_by_what_they_cost(tmp_path):
    """A mix and a backdoor of plain SFT, with a later attack, and one fine-tuning that nobody attacks; the backdoor is asked both ways."""
    place, out = make_place(tmp_path / "place"), tmp_path / "out"
    flags = ("--config.compare.ratios=(0.25,)", "--config.train.steps=2", "--config.compare.methods=('sft',)",
             "--config.compare.vary=('attack.name=mix|trigger',)", "--config.attack.trigger=w7 w8", "--config.attack.refusal=no",
             "--config.compare.fa_loss=5", "--config.after.steps=1")  # fmt: skip
    assert panacea("run", *place.flags(*flags), f"--workdir={out}") == 0
    result = json.loads((out / "compare.json").read_text())
    mix, trigger = (r for r in result["rows"] if r["ratio"] is not None)
    assert "hs_attacked" not in mix["figures"] and "hs_attacked" in trigger["figures"]
    counted = {}
    for note in out.glob("cells/sft/*/cell.json"):
        cell = json.loads(note.read_text())
        made = json.loads((out / cell["stages"]["finetune"] / "manifest.json").read_text())
        counted[cell["setting"]["attack.name"], cell["ratio"]] = made["outcome"]["records"]["user"]
        asked = note.parent / "generations" / "advbench-attacked.jsonl"
        assert asked.is_file() == (cell["setting"]["attack.name"] == "trigger")
        if asked.is_file():
            assert all(json.loads(line)["instruction"].startswith("w7 w8 ") for line in asked.read_text().splitlines())
    assert counted == {("mix", 0.25): 12, ("trigger", 0.25): 15, ("mix", 0.0): 12}
    assert {path.parent.name.partition("-attack")[0] for path in out.glob("cells/sft/*/after")} == {"seed0-p0.25"}
    [worst] = result["worst"]
    assert worst["least_fa"] == -5.0 and worst["hs"]["worst"] == max(
        mix["figures"]["hs"]["mean"], *(trigger["figures"][f]["mean"] for f in ("hs", "hs_attacked"))
    )
    assert "HS as the attacker asks" in (out / "compare.md").read_text()
    assert command(place, tmp_path / "none", *flags[2:]) == 2  # of goals alone there is no FA
