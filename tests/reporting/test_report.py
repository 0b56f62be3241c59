"""What a report says of folders whose figures are known, in its tables, sheets and commands."""

import csv
import dataclasses
import io
import itertools
import json
import random
import shlex
import sys

import pyarrow.parquet
import pytest

from panacea_jax import cli
from panacea_jax.cli.parsing import parse_command
from panacea_jax.errors import InputError
from panacea_jax.reporting.commands import command_of
from panacea_jax.reporting.epochs import epochs_section
from panacea_jax.reporting.evidence import failure_section, judges_section
from panacea_jax.reporting.gather import gather
from panacea_jax.reporting.harmless import harmless, shown
from panacea_jax.reporting.in_short import MODELS, short_section
from panacea_jax.reporting.layer_section import layers_section
from panacea_jax.reporting.markdown import report_markdown
from panacea_jax.reporting.outcomes import Estimate, Found, Outcome, ToSft, Trained, figures_of
from panacea_jax.reporting.published import published_section
from panacea_jax.reporting.report import write_report
from panacea_jax.reporting.rerun import rerun_section
from panacea_jax.reporting.scores import pareto_front, scores_section, tradeoff_section
from panacea_jax.reporting.sheets import as_sheet, outcome_rows
from panacea_jax.reporting.training import POINTS, training_section
from panacea_jax.reporting.variation import place_of, variation_section
from panacea_jax.workdir import StageFolder, plain, read_manifest
from tests.reporting.folders import (
    METHODS,
    RATIOS,
    write_compared,
    write_layers,
    write_metrics,
    write_run,
    write_stage,
    write_swept,
)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    return write_compared(tmp_path_factory.mktemp("compared"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "sft", 9, 8, "sft")
    write_run(root / "ours", 2, 5, **{"defence.rho": 0.5, "data.poison_ratio": 0.2, "export.without_epsilon": True})
    return root


def outcome(method, hs, fa, **more):
    return Outcome(method, {"hs": Estimate(float(hs)), "fa": Estimate(float(fa))}, **more)


# ---- what is read
def test_a_comparison_is_read_as_it_is(compared):
    found = gather(compared)
    rows = json.loads((compared / "compare.json").read_text())["rows"]
    assert len(found.outcomes) == len(rows) == 1 + len(METHODS) * len(RATIOS)
    for ours, row in zip(found.outcomes, rows):
        assert (ours.method, ours.ratio) == (row["method"], row["ratio"])
        assert {n: [e.mean, e.low, e.high] for n, e in ours.figures.items()} == {
            n: [f["mean"], *f["ci95"]] for n, f in row["figures"].items()
        }
    assert not found.outcomes[0].attacked and all(o.attacked for o in found.outcomes[1:])
    # Three methods at two seeds have their cells; they are called as their outcomes are.
    labels = [f"{method} (p=0.1)" for method in METHODS[:3]]
    assert [(r.label, r.seed) for r in found.runs] == [(label, seed) for label in labels for seed in (0, 1)]
    assert all(set(run.manifests()) == {"finetune", "generations"} for run in found.runs)
    assert found.notes == ["Judge refusal. Of two seeds."]


def test_runs_are_read_from_their_scores(runs):
    found = gather(runs)
    assert [(o.method, o.figures["hs"].mean, o.figures["fa"].mean) for o in found.outcomes] == [("ours", 20, 50), ("sft", 90, 80)]
    assert found.outcomes[0].costs["defence"].startswith("finetune: panacea:rho=0.5,lam=0.001")
    # 100 steps; every stretch but the first, which compiles, took half a second a step.
    assert [o.costs["seconds of steps"] for o in found.outcomes] == ["50", "50"]
    one = gather(runs / "ours", [runs / "sft"])
    assert [o.method for o in one.outcomes] == ["ours", "sft"] and one.outcomes[0].figures == found.outcomes[0].figures


def test_benign_answered_is_what_the_over_refusal_set_leaves(tmp_path):
    scores = {
        "hs": None, "hs_plus": None, "fa": {"pairs-a": 50.0, "pairs-benign": 70.0}, "over_refusal": 30.0, "sets": {},
        "ci95": {"fa": {"pairs-a": [40.0, 60.0], "pairs-benign": [60.0, 80.0]}, "over_refusal": [20.0, 45.0]},
    }  # fmt: skip
    assert figures_of(scores, tmp_path) == {"fa": Estimate(50, 40, 60), "benign": Estimate(70, 55, 80)}
    scores["over_refusal"] = None
    assert figures_of(scores, tmp_path)["benign"] == Estimate(70, 60, 80)


def test_a_sweep_names_methods_by_what_the_defender_chose(tmp_path):
    found = gather(write_swept(tmp_path))
    first = found.outcomes[0]
    assert (first.method, first.case) == ("panacea:rho=0.1,lam=0.001", "optimizer.learning_rate=0.0001")
    assert len(found.outcomes) == 11
    assert found.failing == [("panacea:rho=1.0,lam=0.01 (optimizer.learning_rate=0.001)", "failed: diverged at step 3")]
    charts = variation_section(found).charts
    maps = [chart for chart in charts if chart.name.startswith("map_hs")]
    # At each learning rate one, with a cell for every run that has a result.
    assert [len(chart.spec["data"]["values"]) for chart in maps] == [6, 5]
    assert {(v["x"], v["y"]) for v in maps[0].spec["data"]["values"]} == set(itertools.product((0.1, 0.5, 1.0), (0.001, 0.01)))


def test_scores_that_were_not_measured_alike_are_set_apart_by_a_line(runs, tmp_path):
    write_run(tmp_path / "other", 1, 1)
    scores = json.loads((tmp_path / "other" / "scores.json").read_text())
    scores["judge"]["name"] = "strict"
    (tmp_path / "other" / "scores.json").write_text(json.dumps(scores))
    notes = gather(runs / "sft", [tmp_path / "other"]).notes
    assert any(note.startswith("NOT TO BE COMPARED: sft and other") and "the judge" in note for note in notes)
    assert not any("NOT TO BE COMPARED" in note for note in gather(runs).notes)


SCORED = {"hs": 1.0, "hs_plus": None, "fa": {}, "over_refusal": None, "sets": {}, "ci95": {"hs": [0.0, 2.0]}}
JUDGE = {"judge": {"name": "refusal", "version": "1"}}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "nothing to report"),
        ({"compare.json": "{"}, "compare.json: not readable as JSON"),
        ({"compare.json": '{"rows": [{}]}'}, "compare.json: not a comparison of ours"),
        ({"sweep.json": "[]"}, "sweep.json: not a JSON object"),
        ({"sweep.json": '{"rows": 3}'}, "sweep.json: not a sweep of ours"),
        ({"scores.json": '{"hs": 1}'}, "scores.json: not a scores.json of ours"),
        ({"scores.json": '{"hs": NaN}'}, "scores.json: not readable as JSON"),
        ({"scores.json": json.dumps(SCORED)}, "scores.json: not a scores.json of ours"),
        ({"scores.json": json.dumps(SCORED | {"hs": "many"})}, "scores.json: not a scores.json of ours"),
        ({"scores.json": json.dumps(SCORED | JUDGE), "layers.json": '{"epsilon": "last", "layers": [{"layer": 0}]}'},
         "layers.json: not coefficients of ours"),
        ({"scores.json": json.dumps(SCORED | JUDGE), "layers.json": '{"epsilon": "last", "layers": []}'},
         "layers.json: not coefficients of ours"),
    ],
)
def test_a_folder_that_cannot_be_reported_is_named(tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_other_files_are_left_alone(runs, tmp_path):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(InputError, match="without a report of ours"):
        write_report(runs, out=tmp_path)
    assert (tmp_path / "index.html").read_text() == "mine"


def test_without_the_library_one_line_says_what_to_install(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(InputError, match=r"pip install 'panacea_jax\[report\]'"):
        write_report(runs, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_run_that_is_not_scored_yet_has_its_training(tmp_path):
    stage = write_stage(tmp_path, "finetune", {"defence.name": "sft"}, {"steps": 100})
    write_metrics(stage, 2.0)
    page = write_report(tmp_path).read_text("utf-8")
    assert "Training, step by step" in page and "<h2" in page and "Answers</h2>" not in page
    assert pyarrow.parquet.read_table(tmp_path / "report" / "report.parquet").num_rows == 0


# ---- what is said
def test_the_front_is_what_no_other_beats():
    """Against the definition, on points with many equals."""
    rng = random.Random(0)
    for _ in range(50):
        points = [(float(rng.randrange(5)), float(rng.randrange(5))) for _ in range(8)]
        beaten = {
            i for i, j in itertools.permutations(range(8), 2)
            if points[j][0] <= points[i][0] and points[j][1] >= points[i][1] and points[j] != points[i]
        }  # fmt: skip
        assert set(pareto_front(points)) == set(range(8)) - beaten
    assert pareto_front([]) == []


def test_the_front_is_drawn_within_a_case_and_without_the_model_before(tmp_path):
    before = outcome("aligned", 0, 100, attacked=False)
    weak = [outcome(m, hs, fa, ratio=0.1) for m, hs, fa in (("a", 10, 50), ("b", 20, 60), ("c", 30, 55))]
    strong = [outcome(m, hs, fa, ratio=0.3) for m, hs, fa in (("a", 50, 50), ("b", 40, 60))]
    section = tradeoff_section(Found(tmp_path, [before, *weak, *strong], []))
    assert section.tables[0].rows == [["HS and FA", "p=0.1", "a, b"], ["HS and FA", "p=0.3", "b"]]
    first = section.charts[0].spec["data"]["values"]
    assert {v["series"]: v["front"] for v in first} == {"aligned": False, "a": True, "b": True, "c": False}


def test_numbers_of_methods_and_settings_are_axes():
    assert place_of(outcome("panacea:rho=0.5,lam=0.01", 0, 0, ratio=0.1)) == ("panacea", {"ρ": 0.5, "λ": 0.01, "poison ratio": 0.1})
    assert place_of(outcome("vaccine:rho=2+panacea:rho=auto", 0, 0)) == ("vaccine+panacea:rho=auto", {"vaccine ρ": 2.0})
    assert place_of(outcome("before: panacea:rho=0.5", 0, 0)) == ("before: panacea", {"ρ": 0.5})
    setting = {"train.epochs": 5, "lora.policy": "merged", "data.shuffle": True}
    assert place_of(outcome("my run", 0, 0, setting=setting)) == ("my run, lora.policy=merged, data.shuffle=True", {"train.epochs": 5.0})


def test_curves_keep_their_last_and_leave_out_what_is_not_finite(runs):
    (run, *_) = gather(runs).runs
    lines = [{"step": i + 1, "loss": float(i)} for i in range(1000)]
    lines += [{"step": 1001, "loss": None}, {"step": 1002, "validation_loss": 1.0}]
    path = run.stages["finetune"] / "metrics.jsonl"
    kept = path.read_bytes()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        values = training_section(Found(runs, [], [run])).charts[0].spec["data"]["values"]
    finally:
        path.write_bytes(kept)
    assert len(values) <= POINTS + 1 and (values[0]["x"], values[-1]["x"], values[-1]["y"]) == (1, 1000, 999.0)


def test_checkpoints_that_answered_are_points_over_epochs(tmp_path):
    write_run(tmp_path / "ours", 2, 5)
    ends = {"hs": [10.0, 60.0], "hs_plus": [10.0, 60.0], "fa": {"gsm8k": [20.0, 80.0]}, "over_refusal": [0.0, 50.0]}
    points = [
        {"step": 50 * n, "epoch": n / 2, "hs": 10.0 * n, "hs_plus": 10.0 * n, "fa": {"gsm8k": 50.0}, "over_refusal": 25.0, "ci95": ends}
        for n in (1, 2, 3)
    ]  # fmt: skip
    (tmp_path / "ours" / "curve.json").write_text(json.dumps({"judge": "refusal", "steps_per_epoch": 100, "points": points}))
    charts = {chart.name: chart.spec["data"]["values"] for chart in epochs_section(gather(tmp_path)).charts}
    assert [(v["x"], v["y"], v["low"], v["high"]) for v in charts["epochs_hs"]] == [(n / 2, 10.0 * n, 10.0, 60.0) for n in (1, 2, 3)]
    assert {(v["y"], v["low"], v["high"]) for v in charts["epochs_benign"]} == {(75.0, 50.0, 100.0)}
    (tmp_path / "ours" / "curve.json").write_text('{"points": [{}]}')
    with pytest.raises(InputError, match=r"curve.json: not a curve of ours"):
        epochs_section(gather(tmp_path))


def test_layers_of_one_run_are_stacked_and_of_several_set_side_by_side(tmp_path):
    write_run(tmp_path / "deep", 2, 5)
    write_layers(tmp_path / "deep", 4)
    (chart,) = layers_section(gather(tmp_path)).charts
    bars = chart.spec["data"]["values"]
    assert sum(v["y"] for v in bars) == pytest.approx(100) and [v["y"] for v in bars[:2]] == pytest.approx([20, 20])
    assert {v["series"] for v in bars} == {"q", "v"}
    write_run(tmp_path / "flat", 2, 5)
    write_layers(tmp_path / "flat", 2)
    (chart,) = layers_section(gather(tmp_path)).charts
    lines = {name: [(v["x"], v["y"]) for v in chart.spec["data"]["values"] if v["series"] == name] for name in ("deep", "flat")}
    # In units of their means: 4, 3, 2, 1 over 2.5, and 2, 1 over 1.5.
    assert lines["deep"] == [(pytest.approx(l / 3), pytest.approx((4 - l) / 2.5)) for l in range(4)]
    assert lines["flat"] == [(0, pytest.approx(4 / 3)), (1, pytest.approx(2 / 3))]


def of_ten(method, hs, low, high, **more):
    return Outcome(method, {"hs": Estimate(hs, low, high), "benign": Estimate(70.0, 40.0, 90.0)}, **more)


def test_in_short_says_whether_there_was_harm_and_what_undid_it(tmp_path):
    before, sft = of_ten("before", 10.0, 5.0, 20.0, attacked=False), of_ten("sft", 60.0, 50.0, 70.0, ratio=0.1)
    before, sft = (dataclasses.replace(o, costs={"perplexity": x}) for o, x in ((before, "30.00"), (sft, "12.00")))
    tests = {"hs": ToSft(-55.0, 0.0001), "hs_plus": ToSft(-1.0, 0.5), "benign": ToSft(-20.0, 0.03)}
    strong = of_ten("strong", 5.0, 1.0, 9.0, ratio=0.1, to_sft=tests)
    close = {"hs": ToSft(2.0, 0.6), "benign": ToSft(0.0, 1.0)}
    weak = of_ten("weak", 62.0, 52.0, 72.0, ratio=0.1, costs={"perplexity": "13.00"}, to_sft=close)
    harm, *methods, last = short_section(Found(tmp_path, [before, sft, strong, weak], [])).text
    assert harm == "Plain fine-tuning: HS 10.0 [5.0, 20.0] % before it, 60.0 [50.0, 70.0] % after. " + (
        "Perplexity of ordinary answers: 30.00 before, 12.00 after."
    )
    assert methods == [
        "strong, beside plain fine-tuning: HS 5.0 [1.0, 9.0] %, 55.0 points lower (p < 0.001); "
        "benign answered 70.0 [40.0, 90.0] %, 20.0 points lower (p = 0.030).",
        "weak, beside plain fine-tuning: HS 62.0 [52.0, 72.0] %, no difference shown (+2.0 points, p = 0.600); "
        "benign answered 70.0 [40.0, 90.0] %, the same; perplexity 13.00.",
    ]
    assert "panacea verify" in last
    # Where intervals meet no harm is shown; where nothing was mixed in, what could show it is said.
    for ratio, advised in ((0.0, True), (0.1, False)):
        meek = [dataclasses.replace(o, ratio=ratio) for o in (of_ten("sft", 15.0, 8.0, 30.0), weak)]
        said = short_section(Found(tmp_path, [before, *meek], [])).text[0]
        assert "These prompts do not show that it did harm" in said and ("config.data.attack" in said) is advised
    assert short_section(Found(tmp_path, [before, sft], [])) is None, "nothing stands beside SFT"
    assert short_section(Found(tmp_path, [sft, *[strong] * MODELS], [])) is None, "the tables are shorter"


def test_in_short_is_of_the_tests_in_compare_json(compared):
    found = gather(compared)
    rows = json.loads((compared / "compare.json").read_text())["rows"]
    for ours, row in zip(found.outcomes, rows):
        tests = row["against_sft"] or {}
        assert {name: tuple(d) for name, d in ours.to_sft.items()} == {n: (t["difference"], t["p"]) for n, t in tests.items()}
    few = dataclasses.replace(found, outcomes=[o for o in found.outcomes if o.method in METHODS[:3] or not o.attacked])
    cases = [line.partition(": ")[0] for line in short_section(few).text[:-1]]
    assert cases == ["p=0.1"] * 3 + ["p=0.3"] * 3, "SFT and two others, case by case"


def test_a_log_is_of_the_run_and_not_of_where_one_stands(tmp_path, monkeypatch):
    """A run without fine-tuning, while the current folder holds the log of another."""
    monkeypatch.chdir(write_stage(tmp_path, "finetune", {"defence.name": "sft"}, {}))
    write_metrics(tmp_path / "finetune", 2.0)
    healed = write_stage(tmp_path / "healed", "heal", {"defence.name": "antidote"}, {})
    assert training_section(Found(tmp_path, [], [Trained("healed", 0, healed.parent, {"heal": healed})])) is None


def test_signs_of_failure_are_found(compared, runs, tmp_path):
    rows = failure_section(gather(compared)).tables[0].rows
    assert ["seed 1", "fails the guard: HS at most 2", ""] in rows
    assert next(row[2] for row in rows if row[1] == "warning") == "step 50: invented <b>warning</b>"
    assert any(row[1] == "the task is lost" and row[0].startswith("antidote") for row in rows)
    assert any(row[:2] == ["ours, seed 0, finetune", "ε is not applied"] for row in failure_section(gather(runs)).tables[0].rows)
    good = Found(tmp_path, [outcome("a", 1, 90)], [])
    assert not failure_section(good).tables and failure_section(good).text[0].startswith("None of the known ones")
    harmless_attack = Found(tmp_path, [outcome("aligned", 5, 10, attacked=False), outcome("sft", 5, 90)], [])
    assert "the attack did not raise HS" in [row[1] for row in failure_section(harmless_attack).tables[0].rows]


def test_judges_stand_side_by_side(compared):
    (table,) = judges_section(gather(compared)).tables
    row = dict(zip(table.heads, next(row for row in table.rows if row[0].startswith("sft"))))
    # Of ten answers the first judge flags 0 … 9, as does the second.
    assert (row["first"], row["second"], row["n"]) == ("refusal", "strict", "10")
    assert sum(int(row[key]) for key in ("both", "only first", "only second", "neither")) == 10


def test_published_figures_stand_beside_ours_of_the_same_kind_only(tmp_path):
    like = {"model.path": "hub/Llama-2-7b-hf", "data.attack": ""}
    write_run(tmp_path / "sft", 3, 4, "sft", **like)
    section = published_section(gather(tmp_path / "sft"))
    (table,) = section.tables
    assert "llama-2-7b, gsm8k, p=0 (the authors' logs" in table.title
    assert table.rows[0] == ["sft", "61.5", "27.6", "30.0 [10.8, 60.3]", "40.0 [16.8, 68.7]"]
    assert table.rows[1] == ["repnoise", "66.1", "27.4", "–", "–"]
    assert "learning rate 0.001, here 2e-05" in section.text[1]
    write_run(tmp_path / "other", 3, 4, "sft", **like | {"model.path": "hub/Llama-2-13b-hf"})
    section = published_section(gather(tmp_path / "other"))
    assert not section.tables and "is of this base, task and poison ratio" in section.text[0]


# ---- what is written
def test_text_of_others_is_spelt_out_and_cut():
    assert shown("\x1b[31m\u202ewug\u2069\x07") == "\\x1b[31m\\u202ewug\\u2069\\x07"
    assert shown("wug" * 200, most=6) == "wugwug … (594 more characters)"


def test_a_sheet_holds_no_formula():
    rows = [{"method": name, "hs": -1.5} for name in ("=1+1", "+1", "-1", "@wug", "\twug", "wug")]
    written = list(csv.reader(io.StringIO(as_sheet(rows))))[1:]
    assert [row[0] for row in written] == ["'=1+1", "'+1", "'-1", "'@wug", "'\twug", "wug"]
    assert {row[1] for row in written} == {"-1.5"}  # a number stays one


def test_markdown_holds_no_markup_of_others(compared):
    found = gather(compared)
    found = Found(found.folder, [outcome("<b>|x|</b> [a](http://b) `c`", 1, 2)], [])
    text = report_markdown("t", "s", [harmless(scores_section(found))], lambda chart: f"{chart.name}.svg")
    assert r"\<b\>\|x\|\</b\> \[a\](http://b) \`c\`" in text
    assert all(line.count("|") - line.count(r"\|") == 4 for line in text.splitlines() if line.startswith("|"))


def test_files_agree(runs, tmp_path, capsys):
    """The command writes them all; CSV and Parquet hold the figures of the tables, unrounded."""
    out = tmp_path / "out"
    assert cli.run(["report", f"--workdir={runs / 'sft'}", f"--against={runs / 'ours'}", f"--out={out}"]) == 0
    assert capsys.readouterr().out.strip().endswith("index.html")
    scores = json.loads((runs / "ours" / "scores.json").read_text())
    (_, ours) = pyarrow.parquet.read_table(out / "report.parquet").to_pylist()
    assert (ours["method"], ours["hs"], [ours["hs_low"], ours["hs_high"]]) == ("ours", scores["hs"], scores["ci95"]["hs"])
    assert ours["poison_ratio"] is None and isinstance(ours["seeds"], str)
    sheet = list(csv.DictReader(io.StringIO((out / "report.csv").read_text("utf-8"))))
    assert [float(row["hs"]) for row in sheet] == [90.0, scores["hs"]]
    text = (out / "report.md").read_text("utf-8")
    pictures = sorted(path.name for path in (out / "figures").iterdir())
    assert pictures and all(f"(figures/{name})" in text for name in pictures)
    assert "<script" not in text and "taken" not in text  # what models wrote stays on the page
    # Again: an earlier report of ours is replaced.
    assert cli.run(["report", f"--workdir={runs / 'sft'}", f"--out={out}"]) == 0
    left = {path.name for path in (out / "figures").iterdir()}
    assert left < set(pictures) and all(f"(figures/{name})" in (out / "report.md").read_text("utf-8") for name in left)
    assert len(outcome_rows(gather(runs / "sft"))) == 1


def test_commands_ask_for_what_was_made(runs):
    """Read again as a command line, they give the configuration of the manifest."""
    stage = runs / "ours" / "finetune"
    manifest = read_manifest(stage)
    command = shlex.split(command_of("finetune", manifest["config"], "x y"))
    assert command[:2] == ["panacea", "finetune"] and command[-1] == "--workdir=x y"
    config = parse_command("finetune", command[2:])[1]
    for section, held in manifest["config"].items():
        found = json.loads(json.dumps(config[section].to_dict() if section != "seed" else config.seed))
        assert found == held, section
    answers = read_manifest(runs / "ours" / "generations")
    command = shlex.split(command_of("generations", answers["config"], "x"))
    config = parse_command("generate", command[2:])[1]
    assert list(config.eval.tasks) == answers["config"]["eval"]["tasks"] and config.generate.adapter == "invented/adapter"
    assert (config.generate.max_new_tokens, config.model.dtype, config.eval.num_examples) == (8, "float32", 0)


def test_only_commands_are_commands(tmp_path):
    """A base that was merged first has a folder and a manifest as stages have."""
    write_run(tmp_path / "ours", 2, 5)
    with StageFolder(tmp_path / "ours", "base", {"merged": "an/adapter"}, {}) as stage:
        stage.begin()
        stage.finish({})
    section = rerun_section(gather(tmp_path / "ours"))
    assert sorted(shlex.split(command)[1] for command in section.commands) == ["finetune", "generate"]
    assert sorted(row[1] for row in section.tables[0].rows) == ["base", "finetune", "generations"]


def test_the_command_of_a_comparison_is_the_one_that_made_it():
    """Whatever recipe it came from: the keys that it changed are written out."""
    flags = [
        "--config.model.path=invented/base", "--config.compare.methods=('sft', 'vaccine:rho=2+panacea')", "--config.compare.seeds=(0, 1)",
        "--config.align.defence.name=sft", "--config.align.optimizer.learning_rate=0.001", "--config.defence.rho=0.25",
        "--config.eval.tasks=('pairs@a b.jsonl',)", "--config.heal.defence.name=ascent", "--config.heal.defence.rho=0.5",
    ]  # fmt: skip
    config = parse_command("run", flags)[1]
    command = shlex.split(command_of("run", plain(config), "x"))
    assert sorted(command[2:-1]) == sorted(flags)
    assert plain(parse_command("run", command[2:-1])[1]) == plain(config)
