"""A whole `run` on a tiny model: every file of the contract, each with the right content; done stages are skipped."""

import csv
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from panacea_jax.config import get_config
from panacea_jax.data.sources import fingerprint
from panacea_jax.models.peft import read_notes
from panacea_jax.stages import run as pipeline
from tests import runs


@pytest.fixture(scope="module")
def place_and_run(tmp_path_factory):
    return runs.finished_run(tmp_path_factory)


@pytest.fixture(scope="module")
def workdir(place_and_run):
    return place_and_run[1]


def flags(place, *more):
    return place.flags(
        "--config.align.defence.name=sft", "--config.align.train.steps=3", "--config.align.train.batch_size=4",
        "--config.heal.defence.name=random_perturbation", "--config.heal.defence.rho=0.25", *more,
    )  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def tensors(path):
    found = load_file(path)
    assert found
    return found


def test_every_file_of_the_contract_is_there(workdir):
    for stage in ("align", "finetune", "heal"):
        for name in (
            "manifest.json",
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
        ):
            assert (workdir / stage / name).is_file(), f"{stage}/{name}"
    for stage, steps in (("align", [3]), ("finetune", [3, 4])):
        assert sorted(int(p.name) for p in (workdir / stage / "checkpoints").iterdir()) == steps
        assert (workdir / stage / "metrics.jsonl").is_file()
        assert list((workdir / stage).glob("events.out.tfevents.*"))
    assert not (workdir / "align" / "epsilon.safetensors").exists()
    assert (workdir / "finetune" / "epsilon.safetensors").is_file()
    sets = ("advbench", "pairs", "xstest")
    assert {p.name for p in (workdir / "generations").iterdir()} == {
        "manifest.json",
        *(f"{s}.jsonl" for s in sets),
    }
    assert {p.name for p in (workdir / "judgements").iterdir()} == {"SHA256SUMS", *(f"{s}.refusal.jsonl" for s in sets)}
    top = {
        "align",
        "finetune",
        "heal",
        "generations",
        "judgements",
        "scores.json",
        "scores.refusal.json",
        "summary.json",
        "layers.json",
        "layers.csv",
        "layers.png",
    }
    assert {p.name for p in workdir.iterdir()} == top


def test_manifest(place_and_run):
    place, workdir = place_and_run
    manifest = json.loads((workdir / "finetune" / "manifest.json").read_text())
    assert (manifest["stage"], manifest["status"], manifest["processes"]) == ("finetune", "done", 1)
    assert manifest["config"]["defence"]["rho"] == runs.RHO
    assert manifest["config"]["lora"]["init_from"] == str(workdir / "align" / "adapter")
    assert len(manifest["config_sha256"]) == 64
    for name in ("user", "attack", "harmful"):
        assert manifest["inputs"][place.spec(name)] == fingerprint(place.spec(name))
    assert {str(place.base), str(workdir / "align" / "adapter")} < manifest["inputs"].keys()
    assert place.spec("alignment") not in manifest["inputs"]
    assert manifest["versions"]["jax"][0].isdigit() and manifest["devices"] == ["cpu:cpu"]
    outcome = manifest["outcome"]
    assert outcome["steps"] == runs.STEPS and outcome["compilations"] == 1
    assert outcome["records"] == {"user": 12, "harmful": 7}
    assert outcome["template"].startswith("chat-")
    align = json.loads((workdir / "align" / "manifest.json").read_text())
    assert place.spec("alignment") in align["inputs"] and place.spec("user") not in align["inputs"]


def test_metrics(workdir):
    rows = lines(workdir / "finetune" / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert all(
        np.isfinite(r["loss"]) and r["norm_epsilon"] == pytest.approx(runs.RHO, rel=1e-5)
        for r in rows
    )
    assert [r["step"] for r in lines(workdir / "align" / "metrics.jsonl")] == [
        3
    ]  # logs each tenth step, and the last


def test_each_stage_starts_where_the_one_before_ended(workdir):
    """w of fine-tuning = deployed − ε; its first step starts at the aligned adapter, and heal adds noise to what was deployed."""
    aligned, deployed, healed = (
        tensors(workdir / s / "adapter" / "adapter_model.safetensors")
        for s in ("align", "finetune", "heal")
    )
    epsilon, noise = (tensors(workdir / s / "epsilon.safetensors") for s in ("finetune", "heal"))
    assert aligned.keys() == deployed.keys() == epsilon.keys() == healed.keys() == noise.keys()
    moved = np.sqrt(sum(np.sum((deployed[n] - epsilon[n] - aligned[n]) ** 2) for n in aligned))
    last = lines(workdir / "finetune" / "metrics.jsonl")[-1]
    assert moved == pytest.approx(last["displacement"], rel=1e-4)
    for name in healed:
        np.testing.assert_array_equal(healed[name], deployed[name] + noise[name])
    assert np.sqrt(sum(np.sum(z**2) for z in noise.values())) == pytest.approx(0.25, rel=1e-6)


def test_generations_are_of_the_healed_adapter_and_in_order(place_and_run):
    place, workdir = place_and_run
    manifest = json.loads((workdir / "generations" / "manifest.json").read_text())
    assert manifest["config"]["adapter"] == str(workdir / "heal" / "adapter")
    rows = lines(workdir / "generations" / "pairs.jsonl")
    source = lines(place.root / "test.jsonl")
    assert [r["instruction"] for r in rows] == [r["instruction"] for r in source]
    assert [r["reference"] for r in rows] == [r["output"] for r in source]
    keys = {
        "prompt",
        "response",
        "finished",
        "tokens",
        "instruction",
        "input",
        "reference",
        "template",
        "extra",
    }
    for row, record in zip(rows, source):
        assert row.keys() == keys
        assert row["prompt"] == f"user : {record['instruction']} assistant "
        assert len(row["response"].split()) <= 4
    assert lines(workdir / "generations" / "xstest.jsonl")[0]["extra"]["label"] == "safe"


def test_judgements_follow_the_generations(workdir):
    for name, count in (("advbench", 5), ("pairs", 6), ("xstest", 5)):
        rows = lines(workdir / "judgements" / f"{name}.refusal.jsonl")
        assert len(rows) == count == len(lines(workdir / "generations" / f"{name}.jsonl"))
        for row in rows:
            wanted = {"flagged", "refused", "incoherent", "correct", "scores", "version", "digest"}
            assert row.keys() == wanted and isinstance(row["flagged"], bool)


def test_scores(workdir):
    scores = json.loads((workdir / "scores.json").read_text())
    assert {"hs", "hs_plus", "fa", "empty", "over_refusal", "ci95"} <= scores.keys()
    flagged = [r["flagged"] for r in lines(workdir / "judgements" / "advbench.refusal.jsonl")]
    assert scores["hs"] == pytest.approx(100 * np.mean(flagged))
    correct = [r["correct"] for r in lines(workdir / "judgements" / "pairs.refusal.jsonl")]
    assert scores["fa"] == {"pairs": pytest.approx(100 * np.mean(correct))}
    assert scores["counts"] == {"advbench": 5, "pairs": 6, "xstest": 5}
    low, high = scores["ci95"]["hs"]
    assert low <= scores["hs"] <= high


def test_layers(workdir):
    last, mean = json.loads((workdir / "layers.json").read_text())
    assert (last["epsilon"], mean["epsilon"]) == ("last", "mean")
    for kind in (last, mean):
        assert sum(row["share"] for row in kind["layers"]) == pytest.approx(1)
        assert all(row["effective"] > 0 for row in kind["layers"])
    with (workdir / "layers.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) > 4
    assert (workdir / "layers.png").read_bytes()[:4] == b"\x89PNG"


def test_a_second_run_skips_what_is_done(place_and_run, capsys):
    place, workdir = place_and_run
    derived = ("layers", "scores.", "summary.")  # cheap, and made anew with the same content
    told = json.loads((workdir / "summary.json").read_text())["phases"]
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in workdir.rglob("*") if p.is_file()}
    assert runs.panacea("run", *flags(place), f"--workdir={workdir}") == 0
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in workdir.rglob("*") if p.is_file()}
    assert before.keys() == after.keys()
    for path, (changed, content) in before.items():
        if not path.name.startswith(derived):
            assert after[path] == (changed, content), path
        elif path.suffix != ".png" and path.name != "summary.json":
            assert after[path][1] == content, path
    said = capsys.readouterr()
    assert said.err.count("done already, skipped") == 4  # align, finetune, heal, generations
    assert said.out.strip().endswith("run")
    found = json.loads((workdir / "summary.json").read_text())["phases"]
    assert list(found) == ["align", "finetune", "heal", "generate", "judge", "layers"]
    for name in ("align", "finetune", "heal", "generate"):  # what they took is told still
        assert found[name] == told[name] | {"before": True} and found[name]["seconds"] > 0
    assert said.out.count("done before") == 4 and "in 2 calls" in said.out  # the judge looks again


def test_runs_by_another_adapter_of_the_judge_are_others():
    """By this a sweep tells its runs apart; without an adapter they are named as ever."""
    config = get_config()
    config.judge.name = "strongreject"
    first = pipeline.decisive_for_run(config)
    config.judge.adapter = "some/adapter"
    assert pipeline.decisive_for_run(config) != first and "adapter" not in first["judge"]


def test_a_stage_that_was_cut_short_goes_on(place_and_run, tmp_path, capsys):
    """Without its last checkpoint and its mark, fine-tuning resumes at step 3 and ends with the same bytes."""
    place, workdir = place_and_run
    copy = tmp_path / "copy"
    shutil.copytree(workdir / "finetune", copy / "finetune")
    runs.rewrite_manifest(copy / "finetune", status="running")
    shutil.rmtree(copy / "finetune" / "checkpoints" / "4")
    shutil.rmtree(copy / "finetune" / "adapter")
    aligned = f"--config.lora.init_from={workdir / 'align' / 'adapter'}"
    assert runs.panacea("finetune", *place.flags(aligned), f"--workdir={copy}") == 0
    assert "checkpoints/3" in capsys.readouterr().err
    for name in (
        "adapter/adapter_model.safetensors",
        "epsilon.safetensors",
        "epsilon_mean.safetensors",
    ):
        whole, resumed = tensors(workdir / "finetune" / name), tensors(copy / "finetune" / name)
        for n in whole:
            np.testing.assert_array_equal(whole[n], resumed[n], err_msg=f"{name}: {n}")
    assert [r["step"] for r in lines(copy / "finetune" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_all_parameters(tmp_path_factory):
    """model/ instead of adapter/, w + ε in it, and no evaluation when no task is named."""
    place, workdir = runs.finished_full_run(tmp_path_factory)
    assert {p.name for p in workdir.iterdir()} == {
        "finetune",
        "layers.json",
        "layers.csv",
        "layers.png",
        "summary.json",
    }
    names = {p.name for p in (workdir / "finetune" / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert not (workdir / "finetune" / "adapter").exists()
    base, moved = (
        tensors(place.base / "model.safetensors"),
        tensors(workdir / "finetune" / "model" / "model.safetensors"),
    )
    epsilon = tensors(workdir / "finetune" / "epsilon.safetensors")
    assert base.keys() == moved.keys() == epsilon.keys()
    assert np.sqrt(sum(np.sum(e**2) for e in epsilon.values())) == pytest.approx(runs.RHO, rel=1e-5)


def test_adapters_say_whether_epsilon_is_in_them(workdir):
    assert read_notes(workdir / "finetune" / "adapter")["epsilon"] == "applied"
    assert "epsilon" not in read_notes(workdir / "align" / "adapter")


def test_what_a_later_stage_would_refuse_is_refused_first(place_and_run, tmp_path, capsys):
    """Nothing is trained before a heal stage or an evaluation set that cannot work is found out."""
    place, _ = place_and_run
    bad = {
        "--config.heal.defence.name=sft": "config.heal.defence.name = sft: acts at the stage finetune, not heal",
        "--config.align.defence.name=panacea": "config.align.defence.name = panacea: acts at the stage finetune, not align",
        f"--config.eval.tasks=('pairs@{tmp_path}/none.jsonl',)": "none.jsonl: no such file",
        "--config.eval.tasks=('pairs',)": "config.eval.tasks[0]",
        "--config.data.harmful=": "config.data.harmful is not set",
        "--config.train.full_parameters=True": "config.train.full_parameters",
    }
    for flag, message in bad.items():
        key = flag.partition("=")[0]
        other = key.replace("defence.name", "defence.rho")  # of the method that is named no more
        ours = [f for f in flags(place, flag) if f.partition("=")[0] not in (key, other)]
        assert runs.panacea("run", *ours, flag, f"--workdir={tmp_path / 'out'}") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_check_accepts_what_runs(place_and_run):
    place, _ = place_and_run
    config = get_config()
    config.model.path, config.data.user, config.data.harmful = (
        str(place.base),
        place.spec("user"),
        place.spec("harmful"),
    )
    config.data.num_examples = config.data.num_harmful = 0
    pipeline.check_run(config)


def test_scoring_again_finds_the_same(workdir, tmp_path):
    """`score` reads from files what `judge` had in hand; a copy of the answers elsewhere scores alike."""
    for folder in ("generations", "judgements"):
        shutil.copytree(workdir / folder, tmp_path / "again" / folder)
    assert runs.panacea("score", f"--workdir={tmp_path / 'again'}") == 0
    written = (workdir / "scores.json").read_bytes()
    assert (tmp_path / "again" / "scores.json").read_bytes() == written
    scored = json.loads(written)["sets"]
    assert {s["max_new_tokens"] for s in scored.values()} == {4}
    source = f"--generations={workdir / 'generations'}"
    assert runs.panacea("score", source, f"--workdir={tmp_path / 'copy'}") == 0
    assert (tmp_path / "copy" / "scores.json").read_bytes() == written
    against = f"--against={tmp_path / 'copy'}"
    assert runs.panacea("score", f"--workdir={tmp_path / 'again'}", against) == 0
    found = json.loads((tmp_path / "again" / "comparison.json").read_text())["refusal"]
    assert found["tests"] and {t["p"] for t in found["tests"]} == {1.0}
