"""Roles of a user's own prompts: harmful ones get HS, benign ones over-refusal, from prompts to scores."""

import json
from pathlib import Path

import pytest

from panacea_jax.data.sources import load_records, parse_source
from panacea_jax.errors import InputError
from panacea_jax.evaluate.tasks import answer_length, find_task, set_names
from panacea_jax.reporting.outcomes import figures_of
from panacea_jax.stages.perplexity import has_answers
from tests import runs
from tests.evaluate.workdirs import NO, YES, write_lines

KEY = "config.eval.tasks"


def content(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def test_generate_judge_and_score(tmp_path: Path) -> None:
    place = runs.make_place(tmp_path / "place")
    goals = write_lines(tmp_path / "goals.jsonl", [{"instruction": f"w{i} w3"} for i in range(5)])
    test = place.root / "test.jsonl"
    specs = (f"pairs:harmful@{goals}", f"pairs:benign@{test}", f"pairs:task@{test}")
    flags = place.flags(f"--config.eval.tasks={specs}", f"--workdir={tmp_path / 'run'}")
    assert runs.panacea("generate", *flags) == 0
    assert runs.panacea("judge", *flags) == 0
    result = content(tmp_path / "run" / "scores.json")
    # A base of random words never refuses.
    assert result["hs"] == 100 - result["sets"]["pairs-harmful"]["empty"] > 0
    assert result["over_refusal"] == 0 and list(result["fa"]) == ["pairs-task"]
    assert result["counts"] == {"pairs-harmful": 5, "pairs-benign": 6, "pairs-task": 6}
    assert runs.panacea("score", f"--workdir={tmp_path / 'run'}") == 0
    assert content(tmp_path / "run" / "scores.json") == result


def test_figures_by_hand(tmp_path: Path) -> None:
    """Refusals lower HS and raise over-refusal; what a harmful record holds as its output is no reference."""
    rows = [
        {"instruction": f"p{i}", "output": answer} for i, answer in enumerate([YES, NO, NO, YES, NO])
    ]
    for name, answers in (("one", rows), ("two", rows[:3])):
        (tmp_path / f"{name}.json").write_text(json.dumps(answers))
    given = f"pairs:harmful@{tmp_path / 'one.json'},pairs:benign@{tmp_path / 'two.json'}"
    assert runs.panacea("score", f"--generations={given}", f"--workdir={tmp_path / 'w'}") == 0
    result = content(tmp_path / "w" / "scores.json")
    assert (result["hs"], result["refused"], result["fa"]) == (40.0, 60.0, {})
    assert result["over_refusal"] == pytest.approx(200 / 3) and result["answered"] == pytest.approx(100 / 3)
    assert result["sets"]["pairs-harmful"]["task"] == "pairs:harmful"


def test_a_model_that_says_nothing_answers_nothing(tmp_path: Path) -> None:
    """It refuses nothing and harms nobody; what tells is that nothing is answered."""
    rows = [{"instruction": f"p{i}", "output": answer} for i, answer in enumerate(["", YES, NO, ""])]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    given = f"pairs:harmful@{tmp_path / 'all.json'},pairs:benign@{tmp_path / 'all.json'}"
    assert runs.panacea("score", f"--generations={given}", f"--workdir={tmp_path / 'w'}") == 0
    result = content(tmp_path / "w" / "scores.json")
    assert [result[name] for name in ("hs", "refused", "over_refusal", "answered", "empty")] == [25.0, 25.0, 25.0, 25.0, 50.0]
    benign = figures_of(result, tmp_path)["benign"]
    assert benign.mean == 25.0 and [benign.low, benign.high] == result["ci95"]["answered"]


def test_answers_take_the_role_of_their_prompts(tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"instruction": "p0"}, {"instruction": "p1"}])
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([{"prompt": f"<u>p{i}<e>", "response": NO} for i in (1, 0)]))
    asked = f"--config.eval.tasks=('pairs:benign@{prompts}',)"
    for given in (answers, f"pairs@{answers}"):
        workdir = tmp_path / ("alone" if given == answers else "told")
        assert runs.panacea("score", f"--generations={given}", asked, f"--workdir={workdir}") == 0
        assert content(workdir / "scores.json")["over_refusal"] == 100.0


def test_the_grammar() -> None:
    source = parse_source("pairs:harmful@a@b.jsonl")
    assert (source.task, source.role, source.slice, source.where) == ("pairs", "harmful", "", "a@b.jsonl")  # fmt: skip
    specs = ["pairs:harmful@x.jsonl", "pairs:harmful@y.jsonl", "pairs:benign@x.jsonl", "pairs@x.jsonl"]
    names = ["pairs-harmful-x", "pairs-harmful-y", "pairs-benign", "pairs"]
    assert set_names(specs) == names
    assert [answer_length(spec) for spec in specs] == [512, 512, 256, 200]
    assert [has_answers(spec) for spec in specs] == [False, False, False, True]
    assert find_task("pairs:task") is find_task("pairs")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pairs:wug@x.jsonl", "unknown role 'wug' of pairs; known: harmful benign task"),
        ("gsm8k:harmful@x.jsonl", "unknown slice 'harmful' of gsm8k"),
    ],
)
def test_unknown_roles_are_named(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_source(spec)


def test_harmful_and_benign_prompts_need_no_answers_and_roles_no_training(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"instruction": "p", "output": None}])
    for role in ("harmful", "benign"):
        assert load_records(f"pairs:{role}@{path}", KEY)[0].instruction == "p"
        with pytest.raises(InputError, match="config.data.user: .* roles are for config.eval.tasks only"):
            load_records(f"pairs:{role}@{path}", "config.data.user", need_output=True)
    for spec in (f"pairs@{path}", f"pairs:task@{path}"):
        with pytest.raises(InputError, match="field 'output' must be text, not null"):
            load_records(spec, KEY)
