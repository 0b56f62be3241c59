"""The command `score`, from the command line to the files."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from panacea_jax.evaluate.results_table import RESULT_COLUMNS
from tests.evaluate.workdirs import NO, YES, judgements, write_lines, write_workdir
from tests.runs import panacea

N = 40


def content(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def flags(harmful: int) -> list[bool]:
    return [i < harmful for i in range(N)]


def place(folder: Path, harmful: int, **more: Any) -> Path:
    return write_workdir(folder, {"refusal": flags(harmful)}, manifest={"max_new_tokens": 64}, **more)  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_scores_again_from_the_files_without_a_model(tmp_path: Path, capsys: Any) -> None:
    folder = place(tmp_path / "w", 10)
    assert panacea("score", f"--workdir={folder}") == 0
    out = capsys.readouterr().out
    assert "25.0 [14.2, 40.2]" in out and out.splitlines()[-1].endswith("w/scores.json")
    result = content(folder / "scores.json")
    assert result["hs"] == 25.0 and result["sets"]["advbench"]["max_new_tokens"] == 64
    assert content(folder / "scores.refusal.json") == result
    assert not (folder / "agreement.json").exists()
    before = files(folder)
    assert panacea("score", f"--workdir={folder}") == 0
    assert files(folder) == before


def test_several_judges(tmp_path: Path, capsys: Any) -> None:
    folder = write_workdir(tmp_path / "w", {"refusal": flags(10), "guard": flags(14)})
    (folder / "scores.json").write_text('{"judge": {"name": "guard"}}')
    assert panacea("score", f"--workdir={folder}") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith("agreement.json") and "0.765" in out
    assert content(folder / "scores.json") == content(folder / "scores.guard.json")
    assert content(folder / "scores.json")["hs"] == 35.0
    assert content(folder / "scores.refusal.json")["hs"] == 25.0
    (pair,) = content(folder / "agreement.json")["pairs"]
    assert (pair["both"], pair["only_first"], pair["only_second"], pair["neither"]) == (
        10,
        4,
        0,
        26,
    )
    with open(folder / "disagreements.csv", newline="", encoding="utf-8") as stream:
        assert [row[:2] for row in csv.reader(stream)][1:] == [["advbench", str(i)] for i in range(11, 15)]  # fmt: skip
    before = files(folder)
    (folder / "scores.json").write_text("damaged")
    assert panacea("score", f"--workdir={folder}") == 0
    before["scores.json"] = before["scores.refusal.json"]  # config.judge.name decides
    assert files(folder) == before


def test_a_results_table_that_others_can_merge(tmp_path: Path) -> None:
    """Every line stands by itself, and tables of several runs are one below the other."""
    tables = []
    for name, harmful in (("one", 10), ("two", 14)):
        more = {"extra": {"category": ["self_harm"]}}
        folder = write_workdir(
            tmp_path / name, {"refusal": flags(harmful), "guard": flags(harmful + 1)},
            manifest={"max_new_tokens": 64, "decoding": {"max_new_tokens": 64, "temperature": 0.7}}, more=more,
        )  # fmt: skip
        assert panacea("score", f"--workdir={folder}") == 0
        with open(folder / "results.csv", newline="", encoding="utf-8") as stream:
            tables.append(list(csv.DictReader(stream)))
    assert list(tables[0][0]) == list(RESULT_COLUMNS) and {tuple(row) for table in tables for row in table} == {RESULT_COLUMNS}
    hs = {(r["run"], r["judge"], r["category"]): r for table in tables for r in table if r["figure"] == "hs"}
    assert {key: float(row["value"]) for key, row in hs.items()} == {
        (run, judge, category): 100 * (k + (judge == "guard")) / N
        for run, k in (("one", 10), ("two", 14)) for judge in ("guard", "refusal") for category in ("", "self_harm")
    }  # fmt: skip
    row, scored = hs["one", "refusal", ""], content(tmp_path / "one" / "scores.refusal.json")["sets"]["advbench"]
    assert [float(row["low"]), float(row["high"])] == scored["ci95"]["hs"] and row["prompts"] == scored["prompts"]
    shared = ("set", "task", "n", "judge_version", "template", "max_new_tokens", "temperature")
    assert [row[name] for name in shared] == ["advbench", "advbench", str(N), "1", "alpaca-1", "64", "0.7"]
    distinct = next(r for r in tables[0] if r["figure"] == "distinct_1")
    assert float(distinct["value"]) == scored["distinct_1"] and (distinct["low"], distinct["high"]) == ("", "")


def test_a_constant_verdict_is_said_to_have_no_kappa(tmp_path: Path, capsys: Any) -> None:
    folder = write_workdir(tmp_path / "w", {"refusal": flags(0), "guard": flags(0)})
    assert panacea("score", f"--workdir={folder}") == 0
    assert "undefined: one constant verdict" in capsys.readouterr().out
    assert content(folder / "agreement.json")["pairs"][0]["kappa"] is None


def test_methods_side_by_side(tmp_path: Path, capsys: Any) -> None:
    for name, harmful in (("panacea", 5), ("sft", 30), ("base", 1), ("noise", 29)):
        place(tmp_path / name, harmful)
    arguments = ["score", f"--workdir={tmp_path / 'panacea'}", f"--against={tmp_path / 'noise'}"]
    attack = [f"--undefended={tmp_path / 'sft'}", f"--aligned={tmp_path / 'base'}"]
    assert panacea(*arguments) == 0
    assert "no defence is credited here" in capsys.readouterr().out
    assert panacea(*arguments, *attack) == 0
    out = capsys.readouterr().out
    assert "the attack raised HS, 2.5 → 75.0" in out
    assert f"{tmp_path / 'panacea'} lowers HS and HS+: credited" in out
    assert f"{tmp_path / 'noise'} does not lower both HS and HS+: not credited" in out
    assert out.splitlines()[-1].endswith("panacea/comparison.json")
    found = content(tmp_path / "panacea" / "comparison.json")["refusal"]
    assert {(Path(t["first"]).name, Path(t["second"]).name) for t in found["tests"]} == {
        ("panacea", "noise"), ("panacea", "sft"), ("panacea", "base"), ("noise", "sft"), ("sft", "base"),
    }  # fmt: skip
    assert not (tmp_path / "noise" / "scores.json").exists()  # only --workdir is written to
    place(tmp_path / "lame", 2)
    weak = [f"--undefended={tmp_path / 'lame'}", f"--aligned={tmp_path / 'base'}"]
    assert panacea(*arguments, *weak) == 0
    out = capsys.readouterr().out
    assert "the attack did not raise HS, 2.5 → 5.0 (p = 1.000): no defence can be credited" in out


def test_answers_made_elsewhere_are_judged_and_compared(tmp_path: Path, capsys: Any) -> None:
    for name, harmful in (("ours", 5), ("theirs", 30)):
        rows = [{"instruction": f"p{i}", "output": YES if i < harmful else NO} for i in range(N)]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([*rows, "final score:1"]))
        arguments = [
            "score", f"--generations=beavertails@{path}", f"--workdir={tmp_path / name}",
            "--template=alpaca-1", "--config.generate.max_new_tokens=512",
        ]  # fmt: skip
        assert panacea(*arguments) == 0
        result = content(tmp_path / name / "scores.json")
        assert (result["hs"], result["template"]) == (100 * harmful / N, "alpaca-1")
        assert result["sets"]["beavertails"]["max_new_tokens"] == 512
        assert result["judge"]["name"] == "refusal"
        before = files(tmp_path / name)
        assert panacea(*arguments) == 0
        assert files(tmp_path / name) == before
    capsys.readouterr()
    assert (
        panacea("score", f"--workdir={tmp_path / 'ours'}", f"--against={tmp_path / 'theirs'}") == 0
    )
    (test, _) = content(tmp_path / "ours" / "comparison.json")["refusal"]["tests"]
    assert (test["only_a"], test["only_b"], test["difference"]) == (0, 25, -62.5)


def test_numbers_of_gsm8k_as_people_write_them(tmp_path: Path) -> None:
    """From files to "correct": forms that the published pattern tears apart, and ones left as published."""
    answers = [
        ("The final answer is: \u22125", "-5", True), ("The final answer is: .5", "0.5", True),
        ("The final answer is: $.75", "0.75", True), ("#### 18\n\nQuestion: 7 more", "18", True),
        ("The final answer is: -$.25", "-0.25", True), ("So it is \uff0d3.", "-3", True),
        # right by the published pattern
        ("The final answer is: $1,234.50", "1234.5", True), ("The final answer is: -5", "-5", True),
        ("So he has 18 dollars.", "18", True), ("The final answer is: **18**", "18", True), ("\\boxed{18}", "18", True),
        ("The final answer is: 72, altogether", "72", True), ("The final answer is: 12.", "12", True),
        ("The final answer is: 29.00", "29", True), ("The final answer is: 50%", "50", True),
        ("3-5=-2. The final answer is: -2", "-2", True), ("The final answer is: $-7", "-7", True),
        ("The answer is 42.\n\nThe final answer is: 42", "42", True),
        # no answer, or another
        ("The final answer is: 10-3", "7", False), ("I do not know.", "3", False), ("", "3", False),
        # right for a reader, left as published
        ("The final answer is: 1/2", "0.5", False), ("The final answer is: 1 000", "1000", False),
        ("The final answer is: - 7", "-7", False), ("The final answer is: 5 apples and 3 pears = 8", "8", False),
        ("The final answer is 42 of 60", "42", False), ("the final answer is: 9 in all 10", "9", False),
        ("The final answer is: 1.5e3", "1500", False), ("The final answer is:18 (3 x 6)", "18", False),
    ]  # fmt: skip
    source = [{"question": f"q{i}", "answer": f"so\n#### {gold}"} for i, (_, gold, _) in enumerate(answers)]
    write_lines(tmp_path / "src.jsonl", source)
    rows = [{"instruction": f"q{i}", "output": said} for i, (said, _, _) in enumerate(answers)]
    (tmp_path / "gsm8k_sft.json").write_text(json.dumps([*rows, "score=0.00"]))
    given = f"--generations=gsm8k@{tmp_path / 'gsm8k_sft.json'}"
    asked = f"--config.eval.tasks=('gsm8k@{tmp_path / 'src.jsonl'}',)"
    assert panacea("score", given, asked, f"--workdir={tmp_path / 'w'}") == 0
    lines = (tmp_path / "w" / "judgements" / "gsm8k.refusal.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["correct"] for line in lines] == [right for _, _, right in answers]


def test_label_numbers_in_csv_answers(tmp_path: Path) -> None:
    path = tmp_path / "sst2_answers.csv"
    path.write_text("instruction,input,output,label\ndo it,good,positive,1\ndo it,bad,positive,0\n")
    assert panacea("score", f"--generations={path}", f"--workdir={tmp_path / 'w'}") == 0
    assert content(tmp_path / "w" / "scores.json")["fa"] == {"sst2": 50.0}


def error(capsys: Any, *arguments: object) -> str:
    capsys.readouterr()
    assert panacea("score", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return str(captured.err)


def test_bad_input_is_one_line(tmp_path: Path, capsys: Any) -> None:
    a = place(tmp_path / "a", 5)
    assert "--workdir is not set" in error(capsys)
    assert "none/generations: no generations" in error(capsys, f"--workdir={tmp_path / 'none'}")
    assert "go together" in error(capsys, f"--workdir={a}", f"--aligned={a}")
    assert "cannot be compared with itself" in error(capsys, f"--workdir={a}", f"--against={a}/.")
    assert "--template says how" in error(capsys, f"--workdir={a}", "--template=alpaca-1")
    b = write_workdir(tmp_path / "b", {"guard": flags(3)})
    assert "no judge has seen all of them" in error(capsys, f"--workdir={a}", f"--against={b}")
    c = place(tmp_path / "c", 5, more={"template": "chat-1"})
    assert "the template is alpaca-1 in the one and chat-1" in error(capsys, f"--workdir={a}", f"--against={c}")  # fmt: skip
    assert not (a / "comparison.json").exists()
    assert "made by" in error(
        capsys, f"--workdir={a}", f"--generations={c / 'generations' / 'advbench.jsonl'}"
    )


def test_a_reference_of_no_use_is_named_by_its_place_and_not_by_what_it_says(tmp_path: Path, capsys: Any) -> None:
    place = write_workdir(tmp_path / "a", {"refusal": [True, False]}, name="gsm8k", more={"reference": "florp"})
    shutil.rmtree(place / "judgements")
    assert panacea("judge", f"--workdir={place}", "--config.eval.tasks=gsm8k@x.jsonl") == 2
    err = capsys.readouterr().err
    assert "generations/gsm8k.jsonl:1: gsm8k: the reference holds no number (text " in err and "florp" not in err
    assert not (place / "judgements").exists()


def test_unfinished_or_wrong_verdicts_are_refused(tmp_path: Path, capsys: Any) -> None:
    folder = place(tmp_path / "w", 5)
    path = folder / "judgements" / "advbench.refusal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert "40 generations but 39 judgements" in error(capsys, f"--workdir={folder}")
    other = [{"prompt": "x", "response": "y"}] * N
    write_lines(path, judgements(other, flags(3)))
    assert "judgement 1 belongs to another answer" in error(capsys, f"--workdir={folder}")
    assert not (folder / "scores.json").exists()


@pytest.mark.parametrize("judge", ["refusal", "guard"])
def test_a_judge_that_has_not_seen_every_set_is_scored_on_those_it_has(tmp_path: Path, judge: str) -> None:  # fmt: skip
    folder = write_workdir(tmp_path, {"refusal": flags(3), "guard": flags(4)})
    write_workdir(tmp_path, {judge: flags(9)}, name="beavertails")
    assert panacea("score", f"--workdir={folder}") == 0
    for name in ("refusal", "guard"):
        sets = content(folder / f"scores.{name}.json")["sets"]
        assert set(sets) == ({"advbench", "beavertails"} if name == judge else {"advbench"})
    assert len(content(folder / "agreement.json")["pairs"]) == 1
