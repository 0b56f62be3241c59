"""Methods side by side: what is refused, what is tested, and when a defence is credited."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from panacea_jax.errors import InputError
from panacea_jax.evaluate.compare import (
    compare,
    figures_table,
    paired_table,
    require_comparable,
    verdict,
)
from panacea_jax.evaluate.pairing import mcnemar
from panacea_jax.records.judged import load_judged, read_decoding, task_of
from tests.evaluate.workdirs import generations, judgements, write_lines, write_workdir


def flags(harmful: int, n: int = 40) -> list[bool]:
    verdicts = [True] * harmful + [False] * (n - harmful)
    random.Random(0).shuffle(verdicts)
    return verdicts


def place(folder: Path, harmful: int = 20, **more: Any) -> Path:
    return write_workdir(
        folder, {"refusal": flags(harmful)}, manifest={"max_new_tokens": 64}, **more
    )


def scores(folder: Path) -> dict[str, Any]:
    return load_judged(folder)["refusal"].scores()


def test_equal_conditions_are_comparable(tmp_path: Path) -> None:
    a, b = place(tmp_path / "a"), place(tmp_path / "b", 30)
    assert require_comparable({"a": scores(a), "b": scores(b)}) == ["advbench"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": {"version": "2"}}, "the version of judge refusal is 1 in the one and 2 in the other"),
        ({"more": {"template": "chat-abc"}}, "the template is alpaca-1 in the one and chat-abc in"),
        ({"more": {"instruction": "another"}}, "the hash of the prompts of set advbench is"),
        ({"more": {"input": "more"}}, "the hash of the prompts of set advbench is"),
        ({"manifest": {"max_new_tokens": 0}}, "max_new_tokens of set advbench is 64 in the one and 512 in"),
        ({"manifest": {"max_new_tokens": None}}, "max_new_tokens of set advbench is 64 in the one and unknown in"),
        ({"manifest": None}, "max_new_tokens of set advbench is 64 in the one and unknown in"),
        ({"name": "beavertails"}, "no evaluation set is common to all .a: advbench; b: beavertails."),
    ],
)  # fmt: skip
def test_other_conditions_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments = {"manifest": {"max_new_tokens": 64}} | change
    a = place(tmp_path / "a")
    b = write_workdir(tmp_path / "b", {"refusal": flags(20)}, **arguments)
    with pytest.raises(InputError, match=message):
        require_comparable({"a": scores(a), "b": scores(b)})


def test_fewer_prompts_another_judge_another_decoding_are_refused(tmp_path: Path) -> None:
    one: dict[str, Any] = {"max_new_tokens": 64, "temperature": 0.0, "merge": True}
    a = scores(write_workdir(tmp_path / "a", {"refusal": flags(20)}, manifest={"decoding": one}))
    fewer = write_workdir(tmp_path / "b", {"refusal": flags(20, 39)}, manifest={"decoding": one})
    with pytest.raises(InputError, match="the number of prompts of set advbench is 40 .* 39"):
        require_comparable({"a": a, "b": scores(fewer)})
    with pytest.raises(InputError, match="the judge is refusal in the one and guard"):
        require_comparable({"a": a, "b": a | {"judge": {"name": "guard", "version": "1"}}})
    with pytest.raises(
        InputError, match="a and c .* decoding.temperature is 0.0 in the one and 0.7"
    ):
        require_comparable({"a": a, "b": a, "c": a | {"decoding": one | {"temperature": 0.7}}})
    merged = a | {"decoding": one | {"merge": False}}
    assert require_comparable({"a": a, "b": merged}) == ["advbench"]
    # elsewhere nobody may have noted a temperature
    assert require_comparable({"a": a, "b": a | {"decoding": {"max_new_tokens": 64}}}) == ["advbench"]  # fmt: skip


def test_tests_are_paired_by_prompt(tmp_path: Path) -> None:
    a = [True] * 6 + [False] * 14
    b = [True] * 2 + [False] * 17 + [True]
    for name, verdicts in (("a", a), ("b", b)):
        write_workdir(tmp_path / name, {"refusal": verdicts})
        lines = generations(["4"] * 5)
        write_lines(tmp_path / name / "generations" / "gsm8k.jsonl", lines)
        right = judgements(lines, [False] * 5, correct=name == "a")
        write_lines(tmp_path / name / "judgements" / "gsm8k.refusal.jsonl", right)
    methods = {name: load_judged(tmp_path / name)["refusal"] for name in "ab"}
    found = compare(methods)
    tests = {(t["set"], t["figure"]): t for t in found["tests"]}
    assert set(tests) == {("advbench", "hs"), ("advbench", "hs_plus"), ("gsm8k", "fa")}
    hs = tests["advbench", "hs"]
    assert (hs["first"], hs["second"], hs["n"], hs["only_a"], hs["only_b"]) == ("a", "b", 20, 4, 1)
    assert hs["difference"] == 15.0 and hs["p"] == mcnemar(4, 1)
    assert tests["gsm8k", "fa"]["difference"] == 100.0
    assert found["attack"] is None and found["credited"] is None
    assert verdict(found)[0].startswith("no defence is credited here")
    json.dumps(found, allow_nan=False)


def attacked(tmp_path: Path, aligned: int, undefended: int, defended: int, **more: Any) -> dict[str, Any]:  # fmt: skip
    methods = {
        name: load_judged(place(tmp_path / name, harmful, **(more if name == "defence" else {})))[
            "refusal"
        ]
        for name, harmful in (("defence", defended), ("sft", undefended), ("base", aligned))
    }
    return compare(methods, undefended="sft", aligned="base")


def test_a_defence_is_credited_after_an_attack_that_worked(tmp_path: Path) -> None:
    found = attacked(tmp_path, 2, 30, 8)
    attack = found["attack"]["advbench"]
    assert attack["raised"] and (attack["aligned"], attack["undefended"]) == (5.0, 75.0)
    assert found["credited"] == {"defence": {"advbench": True}}
    assert verdict(found)[1] == "advbench: defence lowers HS and HS+: credited"


@pytest.mark.parametrize(("aligned", "undefended"), [(20, 20), (20, 21), (30, 5)])
def test_no_defence_is_credited_when_the_attack_did_not_raise_hs(tmp_path: Path, aligned: int, undefended: int) -> None:  # fmt: skip
    found = attacked(tmp_path, aligned, undefended, 0)
    assert not found["attack"]["advbench"]["raised"]
    assert found["credited"] == {"defence": {"advbench": False}}
    assert "the attack did not raise HS" in verdict(found)[0]
    assert verdict(found)[0].endswith("no defence can be credited")


def test_a_defence_that_does_nothing_or_stutters_is_not_credited(tmp_path: Path) -> None:
    assert not attacked(tmp_path / "nothing", 2, 30, 29)["credited"]["defence"]["advbench"]
    found = attacked(tmp_path / "stutters", 2, 30, 0, verdict={"incoherent": True})
    assert not found["credited"]["defence"]["advbench"]
    assert verdict(found)[1].endswith("not credited")


def test_without_a_harmful_set_there_is_nothing_to_credit(tmp_path: Path) -> None:
    for name in "abc":
        write_workdir(tmp_path / name, {"refusal": flags(3)}, name="gsm8k")
    methods = {name: load_judged(tmp_path / name)["refusal"] for name in "abc"}
    found = compare(methods, undefended="b", aligned="c")
    assert verdict(found) == ["no defence can be credited: there is no harmful set"]


def test_tables_show_figures_and_names_as_they_are(tmp_path: Path) -> None:
    found = attacked(tmp_path, 2, 30, 8)
    found["methods"]["[red]x"] = found["methods"].pop("defence")
    console = Console(width=200, file=io.StringIO())
    console.print(figures_table("all", found["methods"]), paired_table(found["tests"]))
    text = console.file.getvalue()
    assert "[red]x" in text and "75.0 [59.8, 85.8]" in text and "repeated" in text
    assert "HS+" in text and "difference" in text


@pytest.mark.parametrize(
    ("stem", "task"),
    [
        ("gsm8k", "gsm8k"), ("agnews_sft_0.1", "ag_news"), ("Alpaca-Eval", "alpaca_eval"), ("alpaca", "alpaca"),
        ("pairs-x", "pairs"), ("pairs-harmful-x", "pairs:harmful"), ("inferences", None), ("", None),
    ],
)  # fmt: skip
def test_task_of_a_file_name(stem: str, task: str | None) -> None:
    assert task_of(stem) == task


def test_lengths_are_those_of_the_slice_or_the_task(tmp_path: Path) -> None:
    specs = ["beavertails:vaccine-500@x.jsonl", "advbench@y.jsonl"]

    def lengths(stated: int | None) -> Any:
        config = {"eval": {"tasks": specs}, "decoding": {"max_new_tokens": stated, "top_p": 0.9}}
        content = {"stage": "generations", "status": "done", "config": config, "inputs": {}}
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        found = read_decoding(tmp_path)
        assert found is not None and set(found) == {"max_new_tokens", "top_p"}
        return found["max_new_tokens"]

    assert read_decoding(tmp_path) is None
    assert lengths(0) == {"beavertails-vaccine-500": 128, "advbench": 512}
    assert lengths(7) == {"beavertails-vaccine-500": 7, "advbench": 7}
    assert lengths(None) == {"beavertails-vaccine-500": None, "advbench": None}


def test_load_judged_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no generations; run `panacea generate`"):
        load_judged(tmp_path)
    folder = place(tmp_path / "a")
    manifest = folder / "generations" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"done"', '"running"'))
    with pytest.raises(InputError, match="not finished yet"):
        load_judged(folder)
    lines = generations(["x"], template="chat-1") + generations(["x"])
    write_lines(tmp_path / "b" / "generations" / "advbench.jsonl", lines)
    with pytest.raises(InputError, match="several prompt templates"):
        load_judged(tmp_path / "b")
    write_lines(tmp_path / "c" / "generations" / "advbench.jsonl", lines[:1])
    with pytest.raises(InputError, match="no verdict yet; run `panacea judge`"):
        load_judged(tmp_path / "c")
    write_lines(tmp_path / "d" / "generations" / "wug.jsonl", lines[:1])
    with pytest.raises(InputError, match="wug.jsonl: the name begins with no task"):
        load_judged(tmp_path / "d")


def test_a_set_whose_name_goes_on_after_a_dot_keeps_its_verdicts(tmp_path: Path) -> None:
    for name, verdicts in (("pairs-x", [True]), ("pairs-x.y", [False, True])):
        write_workdir(tmp_path, {"refusal": verdicts}, name=name)
    found = load_judged(tmp_path)
    assert list(found) == ["refusal"]
    assert {s.name: len(s.judgements) for s in found["refusal"].sets} == {"pairs-x": 1, "pairs-x.y": 2}  # fmt: skip
