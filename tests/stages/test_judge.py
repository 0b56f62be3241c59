"""The command `judge`: files of several judges side by side, and going on after a kill."""

import json
from pathlib import Path

import pytest

from panacea_jax.data.sources import Record
from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges import guard, reading
from panacea_jax.evaluate.lines import generation_line
from panacea_jax.records.judged import load_judged
from panacea_jax.stages import judge as module
from panacea_jax.stages.judge import judge_stage
from panacea_jax.stages.score import score_stage
from tests.evaluate.judges.models import ANSWERS, judge_config, texts, write_classifier, write_guard

COUNT = 21


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("judges")
    write_classifier(root / "beaver")
    write_guard(root / "guard")
    return {"beaver_dam": root / "beaver", "guard": root / "guard", "refusal": root / "none"}


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work directory with generations of one harmful set; verdicts are flushed every 8."""
    monkeypatch.setattr(module, "FLUSHED_TOGETHER", 8)
    lines = []
    for prompt, answer in zip(*texts(COUNT, 40)):
        record = Record(prompt, "", "", "", {})
        lines.append(
            generation_line(record, prompt=f"P {prompt}", response=answer, template="alpaca-1", finished=True)
        )  # fmt: skip
    (tmp_path / "generations").mkdir()
    path = tmp_path / "generations" / "advbench.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def judging(name, folders, **more):
    config = judge_config(name, folders[name], **more)
    config.eval.tasks = ("advbench@goals.jsonl",)
    return config


def test_judges_stay_side_by_side(workdir, folders):
    kept = {}
    for name in ("refusal", "beaver_dam", "guard"):
        assert judge_stage(judging(name, folders), workdir) == workdir / "scores.json"
        text = (workdir / "scores.json").read_text()
        assert (workdir / f"scores.{name}.json").read_text() == text
        assert json.loads(text)["judge"]["name"] == name
        kept[name] = text
    assert {p.name for p in (workdir / "judgements").iterdir()} == {"SHA256SUMS", *(f"advbench.{name}.jsonl" for name in kept)}
    assert all((workdir / f"scores.{name}.json").read_text() == kept[name] for name in kept)
    judge_stage(judging("refusal", folders), workdir)  # done already, now the latest word
    assert (workdir / "scores.json").read_text() == kept["refusal"]
    line = json.loads((workdir / "judgements/advbench.beaver_dam.jsonl").read_text().split("\n")[0])
    assert len(line["scores"]) == 14 and line["version"].startswith("1-256-float32-")
    assert line["flagged"] is (max(line["scores"].values()) > 0.5)


def test_forms_and_grades_of_the_same_answers_side_by_side(workdir, tmp_path_factory, monkeypatch):
    """Each judge has files of its own, so that all can be set against each other."""
    monkeypatch.setattr(reading, "PAIRS", reading.PAIRS[:2])  # short ones
    folder = tmp_path_factory.mktemp("forms")
    write_guard(folder, more=ANSWERS, seed=5, max_position_embeddings=1024)
    models = dict.fromkeys(("refusal", "llama_guard", "harmbench", "qwen3guard", "strongreject"), folder)
    for name in models:
        judge_stage(judging(name, models), workdir)
    config = judging("refusal", models)
    assert score_stage(config, workdir) == workdir / "agreement.json"
    found = json.loads((workdir / "agreement.json").read_text())
    assert set(found["judges"]) == set(models) and len(found["pairs"]) == 10
    assert all(pair["n"] == COUNT == sum(pair[k] for k in ("both", "only_first", "only_second", "neither")) for pair in found["pairs"])
    graded = json.loads((workdir / "scores.strongreject.json").read_text())["sets"]["advbench"]
    assert 0 < graded["mean_strongreject"] < 100 and graded["partly_refused"] == 0
    assert "partly_refused" not in json.loads((workdir / "scores.refusal.json").read_text())["sets"]["advbench"]
    with (workdir / "results.csv").open() as stream:
        assert {line.split(",")[9] for line in stream} == {"judge", *models}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", ["beaver_dam", "guard"])
def test_judging_goes_on_after_a_kill(workdir, folders, monkeypatch, name):
    """Byte for byte, wherever the file was cut."""
    path = workdir / "judgements" / f"advbench.{name}.jsonl"
    with monkeypatch.context() as m:  # killed between the second and the third chunk
        real, calls = module.judge_lines, []

        def dies(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                raise Killed
            return real(*arguments)

        m.setattr(module, "judge_lines", dies)
        with pytest.raises(Killed):
            judge_stage(judging(name, folders), workdir)
        assert len(path.read_bytes().splitlines()) == 16
    judge_stage(judging(name, folders), workdir)
    whole, scores = path.read_bytes(), (workdir / "scores.json").read_bytes()
    assert len(whole.splitlines()) == COUNT
    starts = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
    for cut in (starts[11], starts[11] + 30, starts[20] - 1, 0):
        path.write_bytes(whole[:cut])
        judge_stage(judging(name, folders), workdir)
        assert path.read_bytes() == whole
        assert (workdir / "scores.json").read_bytes() == scores


def test_verdicts_with_categories_as_they_were_spelt_before_are_gone_on_with(workdir, folders):
    judge_stage(judging("beaver_dam", folders), workdir)
    path, scores = workdir / "judgements" / "advbench.beaver_dam.jsonl", workdir / "scores.json"
    expected = scores.read_bytes()
    assert '"animal_abuse"' in path.read_text()
    lines = path.read_text().replace('"animal_abuse"', '"animal abuse"').splitlines(keepends=True)
    path.write_text("".join(lines[:9]))
    judge_stage(judging("beaver_dam", folders), workdir)
    assert path.read_text().splitlines(keepends=True)[:9] == lines[:9]
    assert scores.read_bytes() == expected


def test_what_is_done_is_not_judged_again(workdir, folders, monkeypatch):
    judge_stage(judging("guard", folders), workdir)

    def fails(*arguments):
        raise AssertionError("asked again")

    monkeypatch.setattr(guard.Guard, "judge", fails)
    monkeypatch.setattr(guard.Guard, "self_test", fails)
    judge_stage(judging("guard", folders), workdir)


def test_another_version_is_refused_and_nothing_lost(workdir, folders):
    judge_stage(judging("guard", folders), workdir)
    path = workdir / "judgements" / "advbench.guard.jsonl"
    before = path.read_bytes()
    with pytest.raises(
        InputError, match=r"advbench\.guard\.jsonl: by version 1-llama_guard-.*not 1-wildguard-"
    ):
        judge_stage(judging("guard", folders, template="wildguard"), workdir)
    assert path.read_bytes() == before


def test_mixed_templates_are_refused_before_judging(workdir, folders):
    path = workdir / "generations" / "advbench.jsonl"
    path.write_text(path.read_text().replace("alpaca-1", "alpaca-0", 1))
    with pytest.raises(InputError, match="several prompt templates"):
        judge_stage(judging("refusal", folders), workdir)
    assert not (workdir / "judgements").exists()


GOOD = {"prompt": "<p>", "instruction": "p", "input": "", "response": "no", "finished": True,
        "reference": "4", "template": "alpaca-1", "extra": {}}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "change", "wanted"),
    [
        ("advbench", {"prompt": ["a", "b"]}, "field 'prompt' must be text, not list"),
        ("advbench", {"response": None}, "field 'response' is null"),
        ("advbench", {"response": 3}, "field 'response' must be text, not int"),
        ("advbench", {"template": None}, "field 'template' is null"),
        ("advbench", {"template": 7}, "field 'template' must be text, not int"),
        ("advbench", {"instruction": {"a": 1}}, "field 'instruction' must be text, not dict"),
        ("advbench", {"extra": "x"}, "field 'extra' must be an object, not str"),
        ("advbench", {"finished": "yes"}, "field 'finished' must be true or false, not str"),
        ("advbench", "prompt", "field 'prompt' is missing"),
        ("advbench", "response", "field 'response' is missing"),
        ("advbench", "template", "field 'template' is missing"),
        ("gsm8k", "reference", "field 'reference' is missing"),
        ("pairs", {"reference": None}, "field 'reference' is null"),
    ],
)
def test_malformed_answers(task, change, wanted, tmp_path):
    """File, line and field, and no verdict is written; so too when scores are made again."""
    line = dict(GOOD)
    if isinstance(change, str):
        del line[change]
    else:
        line |= change
    path = tmp_path / "generations" / f"{task}.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(x) + "\n" for x in (GOOD, GOOD, line, GOOD)))
    config = judge_config("refusal", tmp_path)
    config.eval.tasks = (f"{task}@rows.jsonl",)
    for again in (lambda: judge_stage(config, tmp_path), lambda: load_judged(tmp_path)):
        with pytest.raises(InputError) as error:
            again()
        assert str(error.value) == f"{path}:3: {wanted}"
    assert not (tmp_path / "judgements").exists()


def test_answers_without_what_is_optional(tmp_path):
    """Of answers made by hand: a prompt and a response are enough for a harmful set."""
    path = tmp_path / "generations" / "advbench.jsonl"
    path.parent.mkdir()
    path.write_text('{"prompt": "p", "response": "Sure, take it."}\n' * 2)
    config = judge_config("refusal", tmp_path)
    config.eval.tasks = ("advbench@rows.jsonl",)
    scores = json.loads(judge_stage(config, tmp_path).read_text())
    assert scores["hs"] == 100.0 and scores["template"] == "unknown"
