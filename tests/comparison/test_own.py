"""`panacea compare`: the rows that it chooses by itself, each held against the files behind it."""

import json
import math
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from panacea_jax.comparison import own, run
from panacea_jax.comparison.own import NOISE
from panacea_jax.comparison.results import row
from panacea_jax.config import defence_section, get_config, part_of
from panacea_jax.defences.spec import Stack, parse_stack
from panacea_jax.errors import InputError
from panacea_jax.models.peft import read_notes
from panacea_jax.reporting.found_comparison import read_comparison
from panacea_jax.stages.bare import write_bare
from panacea_jax.train.checkpoints import read_checkpoint
from tests import runs
from tests.reporting.folders import measured
from tests.runs import RHO, make_place, panacea

OURS = f"panacea:rho={RHO},lam=0.3"
WEIGHTS = "adapter_model.safetensors"


def content(root):
    return json.loads((root / "compare.json").read_text())


def rows_of(root):
    return {row["method"]: row for row in content(root)["rows"]}


def report_figure(row):
    figure = row["figures"]["hs"]
    return f"{figure['mean']:.1f} [{figure['ci95'][0]:.1f}, {figure['ci95'][1]:.1f}]"


def norm(path):
    return math.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in load_file(path).values()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A place without an alignment stage, and the comparison of Panacea on it; before, in the same folder, that of a pruning."""
    root = tmp_path_factory.mktemp("own")
    place, out = make_place(root / "place"), root / "out"
    pruned = place.flags("--config.train.steps=2", "--config.defence.name=sft", "--config.heal.defence.name=random_prune")
    assert panacea("compare", *pruned, f"--workdir={out}") == 0
    shutil.copy(out / "compare.json", root / "pruned.json")
    assert panacea("compare", *place.flags("--config.train.steps=2"), f"--workdir={out}") == 0
    return place, out


def test_the_rows_choose_themselves(finished):
    _, out = finished
    result = content(out)
    names = ["sft", NOISE, OURS, f"{OURS}, w alone"]
    assert [(row["method"], row["ratio"]) for row in result["rows"]] == [("before", None), *((name, 0.25) for name in names)]
    assert (result["methods"], result["seeds"], result["ratios"], result["judge"]) == (names, [0], [0.25], "refusal")
    assert any(f"Gaussian noise of norm {RHO:g} on SFT" in note for note in result["notes"])
    table = (out / "compare.md").read_text()
    assert all(f"| {name} |" in table for name in ("before", *names)) and f"* {NOISE}: " in table
    assert result["notes"][1] == f"What {OURS} would deploy lies in this folder, {(tuned(out, 'panacea') / 'adapter').relative_to(out)}."
    report = (out / "report" / "report.md").read_text()
    again = f"    panacea compare --config.model.path={finished[0].base} "
    assert again in report, "`run` with this configuration would train the defence alone"
    assert f"% before it, {report_figure(rows_of(out)['sft'])} % after" in report.partition("## Methods")[0].replace("\\", "")


def test_every_row_is_what_its_answers_scored(finished):
    _, out = finished
    folders = {json.loads(note.read_text())["method"]: note.parent for note in (out / "cells").glob("*/*/cell.json")}
    del folders["random_prune"]  # of the comparison before
    folders["before"] = out / "aligned" / "seed0"
    rows = rows_of(out)
    assert folders.keys() == rows.keys()
    for name, folder in folders.items():
        said = json.loads((folder / "scores.json").read_text())
        assert rows[name]["figures"]["hs"]["mean"] == pytest.approx(said["hs"])
        assert rows[name]["figures"]["fa"]["mean"] == pytest.approx(said["fa"]["pairs"])
        assert rows[name]["figures"]["benign"]["mean"] == pytest.approx(said["answered"])


def test_before_is_the_model_as_it_came(finished):
    place, out = finished
    answered = json.loads((out / "aligned" / "seed0" / "generations" / "manifest.json").read_text())["config"]
    assert (answered["adapter"], answered["model"]["path"]) == ("", str(place.base))


def tuned(out, name):
    return next(out.glob(f"shared/seed0/unaligned/p0.25/{name}*/finetune"))


def test_the_noise_is_as_long_as_epsilon_and_on_top_of_sft(finished):
    _, out = finished
    heal = next(out.glob("cells/sft_*/*/heal"))
    epsilon = norm(tuned(out, "panacea") / "epsilon.safetensors")
    assert norm(heal / "epsilon.safetensors") == pytest.approx(epsilon, rel=1e-6) and epsilon == pytest.approx(RHO, rel=1e-6)
    files = (tuned(out, "sft") / "adapter" / WEIGHTS, heal / "epsilon.safetensors", heal / "adapter" / WEIGHTS)
    before, noise, after = map(load_file, files)
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[name] + noise[name])


def test_w_alone_is_the_defence_without_its_epsilon(finished):
    _, out = finished
    folder = next(out.glob("cells/*w_alone/*"))
    stage = tuned(out, "panacea")
    files = (folder / "bare" / "adapter" / WEIGHTS, stage / "epsilon.safetensors", stage / "adapter" / WEIGHTS)
    w, epsilon, deployed = map(load_file, files)
    assert w.keys() == deployed.keys()
    for name, value in deployed.items():
        np.testing.assert_array_equal(value, w[name] + epsilon[name])
    answered = json.loads((folder / "generations" / "manifest.json").read_text())["config"]["adapter"]
    assert answered == str(folder / "bare" / "adapter") and read_notes(answered) == {"format": "pt", "epsilon": "left out"}


def test_costs_are_those_of_the_rows(finished):
    rows = rows_of(finished[1])
    assert rows["sft"]["passes_to_sft"] == rows[NOISE]["passes_to_sft"] == 1.0
    assert rows[OURS]["passes_to_sft"] == rows[f"{OURS}, w alone"]["passes_to_sft"] == 3.0
    assert rows[OURS]["extra_data"] == ["harmful"] and rows[NOISE]["extra_data"] == []


def test_a_second_start_runs_nothing(finished, capsys):
    place, out = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert panacea("compare", *place.flags("--config.train.steps=2"), f"--workdir={out}") == 0
    changed = {p.name for p in out.rglob("*") if p.is_file() and before.get(p) != p.stat().st_mtime_ns}
    assert {name for name in changed if name.startswith("compare")} == {"compare.json", "compare.csv", "compare.md"}
    assert not {name for name in changed if name.endswith((".safetensors", "manifest.json", "cell.json", "scores.json"))}
    assert NOISE in capsys.readouterr().out


def test_an_epsilon_of_healing_and_records_as_they_came(finished, tmp_path):
    """Without its ε, what heal made is SFT, which has a row already."""
    place, _ = finished
    flags = place.flags(
        "--config.train.steps=2", "--config.data.attack=", "--config.defence.name=sft", "--config.heal.defence.name=ascent",
        "--config.heal.defence.rho=0.25", "--config.seed=3",
    )  # fmt: skip
    assert panacea("compare", *flags, f"--workdir={tmp_path}") == 0
    result = content(tmp_path)
    assert list(rows_of(tmp_path)) == ["before", "sft", NOISE, "ascent:rho=0.25"] and result["ratios"] == [0.0]
    assert result["seeds"] == [3] and "nothing was mixed into the user's records" in result["notes"][-1]
    healed, noise = (norm(next(tmp_path.glob(f"cells/{name}*/*/heal/epsilon.safetensors"))) for name in ("ascent", "sft_"))
    assert healed == pytest.approx(0.25, rel=1e-6) and noise == pytest.approx(healed, rel=1e-6)
    # Another ρ, in the same folder: it has noise of its own length, and the report is of the cells in the table alone.
    assert panacea("compare", *flags[:-2], "--config.heal.defence.rho=0.5", flags[-1], f"--workdir={tmp_path}") == 0
    assert list(rows_of(tmp_path)) == ["before", "sft", NOISE, "ascent:rho=0.5"]
    lengths = [norm(path) for path in tmp_path.glob("cells/sft_*/*/heal/epsilon.safetensors")]
    assert sorted(lengths) == pytest.approx([0.25, 0.5], rel=1e-6)
    found = read_comparison(tmp_path)
    assert sorted(run.label for run in found.runs) == sorted(outcome.label for outcome in found.outcomes)
    assert " compare " in found.commands[0] and f"Gaussian noise of norm {0.5:.4g} on" in "".join(content(tmp_path)["notes"])


def test_a_defence_without_epsilon_has_no_noise_beside_it(finished):
    result = json.loads((finished[0].root.parent / "pruned.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["before", "sft", "random_prune"]
    pruned, where = result["notes"]
    assert pruned == "random_prune has no ε, so neither noise of its length nor w alone stands beside it."
    assert (finished[1] / where.split(", ")[1].removesuffix(".") / WEIGHTS).is_file() and "/heal/adapter" in where


def test_w_alone_of_all_parameters(tmp_path_factory, tmp_path):
    _, workdir = runs.finished_full_run(tmp_path_factory)
    stage = workdir / "finetune"
    bare = write_bare(stage, tmp_path)
    files = (bare / "model.safetensors", stage / "epsilon.safetensors", stage / "model" / "model.safetensors")
    w, epsilon, deployed = map(load_file, files)
    assert w.keys() == deployed.keys() and (bare / "tokenizer.json").is_file()
    for name, value in deployed.items():
        np.testing.assert_array_equal(value, w[name] + epsilon.get(name, 0))
    arrays, _ = read_checkpoint(stage / "checkpoints" / str(runs.STEPS))
    np.testing.assert_array_equal(w["model.embed_tokens.weight"], arrays["params.embed_tokens.embedding"])


def test_w_alone_needs_a_checkpoint(finished, tmp_path):
    _, out = finished
    (tmp_path / "manifest.json").write_bytes((tuned(out, "sft") / "manifest.json").read_bytes())
    with pytest.raises(InputError, match="no checkpoint is left"):
        write_bare(tmp_path, tmp_path / "bare")


@pytest.mark.parametrize("text", ["panacea", "panacea:rho=0.25,lam=0.2", "lisa:rho=2.0", "vaccine:rho=5.0", "random_prune:seed=1"])
def test_a_section_is_the_line_that_it_was_made_of(text):
    stack = parse_stack(text, "key")
    [part] = [part for part in (stack.align, stack.finetune, stack.heal) if part]
    assert part_of(defence_section(part)) == part


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.compare.methods=('sft',)", "config.compare.methods: for `panacea run`"),
        ("--config.heal.methods=('random_prune',)", "config.heal.methods: for `panacea run`"),
        ("--config.export.without_epsilon=True", "config.export.without_epsilon: `compare` has a row of its own"),
        ("--config.eval.tasks=()", "config.eval.tasks is empty"),
        ("--config.data.harmful=", "config.data.harmful"),
        ("--config.compare.seeds=()", "config.compare.seeds = (): name at least one"),
        ("--config.compare.ratios=()", "config.compare.ratios = (): name at least one"),
        ("--config.compare.guard=(2, 95)", "config.compare.guard = (2, 95): no set of config.eval.tasks has benign requests"),
    ],
)
def test_what_it_cannot_follow_is_refused_before_anything_is_made(flag, message, finished, tmp_path, capsys):
    place, _ = finished
    flags = (flag, f"--config.eval.tasks=('{place.spec('goals')}', '{place.spec('test')}')") if "guard" in flag else (flag,)
    assert panacea("compare", *place.flags(*flags), f"--workdir={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_attack_without_harmful_records_has_its_ratio():
    config = get_config()
    assert own._axes(config) == ((0,), (0.0,))
    config.data.poison_ratio, config.attack.name, config.seed = 0.3, "identity", 7
    assert own._axes(config) == ((7,), (0.3,))


def test_ratios_of_nothing_are_refused(finished, tmp_path, capsys):
    place, _ = finished
    flags = place.flags("--config.data.attack=", "--config.compare.ratios=(0.1, 0.3)")
    assert panacea("compare", *flags, f"--workdir={tmp_path}") == 2
    assert "config.compare.ratios = (0.1, 0.3): shares of config.data.attack, which is not set" in capsys.readouterr().err


def test_a_report_that_cannot_be_made_is_no_failure(monkeypatch, tmp_path, capsys):
    def refuse(workdir):
        raise InputError("vl-convert-python is missing")

    monkeypatch.setattr(run, "write_report", refuse)
    (tmp_path / "compare.png").touch()  # of an earlier table, with settings
    rows = [row(Stack(), None, {0: measured(1, 2, 1.0)}, None)]
    result = {"rows": rows, "seeds": [0], "judge": "refusal", "memory": "", "grid": [], "guard": {}}
    assert run.write_result(result, tmp_path) == tmp_path / "compare.json"
    assert capsys.readouterr().err == "no report: vl-convert-python is missing\n"
    assert not (tmp_path / "compare.png").exists()
