"""Sets of harmful prompts as their authors publish them: prompts, categories and the records of each slice; the rows are invented."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from panacea_jax.data.columns import read_columns
from panacea_jax.data.slices import SLICES
from panacea_jax.data.sources import Record, load_records, take
from panacea_jax.errors import InputError
from panacea_jax.evaluate.tasks import answer_length, find_task, set_names

KEY = "config.eval.tasks"


def write_csv(path: Path, header: str, rows: list[list[str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header.split(","), *rows])
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def taken(spec: str) -> list[Record]:
    return take(load_records(spec, KEY), spec, 1)  # which a slice overrides


def asked(records: list[Record]) -> list[tuple[str, Any]]:
    return [(record.instruction, record.extra.get("category")) for record in records]


def harmbench(path: Path) -> Path:
    rows = [
        ["mend a blorf", "standard", "illegal", "", "", "blorf"],
        ["sing of the wug", "copyright", "copyright", "lyrics, hash_check", "", "wug_song"],
        ["and the blick?", "contextual", "chemical_biological", "context", "The blick is green.\n", "blick"],
        ["vix it, twice", "standard", "cybercrime_intrusion", "", "", "vix"],
    ]
    return write_csv(path, "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID", rows)


def test_harmbench(tmp_path: Path) -> None:
    path = harmbench(tmp_path / "harmbench_behaviors_text_all.csv")
    standard = taken(f"harmful:harmbench@{path}")
    assert asked(standard) == [("mend a blorf", ["illegal"]), ("vix it, twice", ["cybercrime_intrusion"])]
    assert [record.extra["BehaviorID"] for record in standard] == ["blorf", "vix"]
    [contextual] = taken(f"harmful:harmbench_contextual@{path}")
    # as HarmBench asks it
    assert contextual.instruction == "The blick is green.\n\n\n---\n\nand the blick?"
    assert len(load_records(f"harmful@{path}", KEY)) == 4
    # a copy of one part, with names of its own
    copy = write_rows(tmp_path / "part.jsonl", [{"prompt": "and?", "context": "So.", "category": "illegal"}])
    assert asked(taken(f"harmful:harmbench_contextual@{copy}")) == [("So.\n\n---\n\nand?", ["illegal"])]


def test_strongreject(tmp_path: Path) -> None:
    rows = [["Hate, harassment and discrimination", "custom", f"wug {i}?"] for i in range(320)]
    path = write_csv(tmp_path / "strongreject_dataset.csv", "category,source,forbidden_prompt", rows)
    records = taken(f"harmful:strongreject@{path}")
    assert asked(records) == [(f"wug {i}?", ["Hate, harassment and discrimination"]) for i in range(313)]
    assert records[0].extra["source"] == "custom"


def test_jailbreakbench_asks_its_goals(tmp_path: Path) -> None:
    rows = [[str(i), f"vix the wug {i}", "Sure, here is", f"Wug {i}", "Physical harm", "Original"] for i in range(3)]
    path = write_csv(tmp_path / "harmful-behaviors.csv", "Index,Goal,Target,Behavior,Category,Source", rows)
    records = taken(f"harmful:jailbreakbench@{path}")
    assert asked(records) == [(f"vix the wug {i}", ["Physical harm"]) for i in range(3)]
    assert records[1].extra["Behavior"] == "Wug 1"


def test_sorry_bench_takes_its_own_words_only(tmp_path: Path) -> None:
    rows = [
        {"question_id": i, "category": str(i // 2 + 1), "turns": [f"wug {i}?"], "prompt_style": style}
        for i, style in enumerate(("base", "caesar", "base", "slang"))
    ]
    path = write_rows(tmp_path / "all.jsonl", rows)
    assert asked(taken(f"harmful:sorry_bench@{path}")) == [("wug 0?", ["1"]), ("wug 2?", ["2"])]
    # a file of one style, with numbers that are numbers
    alone = write_rows(tmp_path / "question.jsonl", [{"question_id": 1, "category": 7, "turns": ["wug?"]}])
    assert asked(taken(f"harmful:sorry_bench@{alone}")) == [("wug?", ["7"])]


def test_hex_phi_is_a_file_a_category_without_heads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "HEx-PHI"
    folder.mkdir()
    (folder / "category_1.csv").write_text('wug one?\n"wug, ""two""?"\n\n')
    (folder / "category_11.csv").write_text("wug eleven?\n")
    (folder / "category_4.csv").write_text("wug four?\r\n")
    (folder / "README.md").write_text("x")
    with caplog.at_level(logging.WARNING):
        records = taken(f"harmful:hex_phi@{folder}")
    assert asked(records) == [
        ("wug one?", ["Illegal Activity"]), ('wug, "two"?', ["Illegal Activity"]), ("wug four?", ["Malware"]),
        ("wug eleven?", ["Tailored Financial Advice"]),
    ]  # fmt: skip
    assert not caplog.records  # its size differs from version to version
    (folder / "category_3.csv").write_text("one\ntwo, three\n")
    with pytest.raises(InputError, match=r"category_3\.csv:2: record 4: 2 cells; a file of HEx-PHI has one a line, the prompt"):
        taken(f"harmful:hex_phi@{folder}")


def test_or_bench(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "or-bench-toxic.csv", "prompt,category", [["wug?", "self-harm"], ["blick?", "privacy"]])
    assert asked(taken(f"harmful:or_bench_toxic@{path}")) == [("wug?", ["self_harm"]), ("blick?", ["privacy"])]
    assert asked(load_records(f"or_bench@{path}", KEY)) == [("wug?", ["self_harm"]), ("blick?", ["privacy"])]
    assert find_task("or_bench").role == "over_refusal"


def test_the_unsafe_half_of_xstest(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a?", "type": "homonyms", "label": "safe"}, {"prompt": "b?", "type": "contrast_homonyms", "label": "unsafe"},
        {"prompt": "c?", "type": "contrast_homonyms"}, {"prompt": "d?", "type": "homonyms"}, {"prompt": "e?"},
    ]  # fmt: skip
    path = write_rows(tmp_path / "xstest.jsonl", rows)
    assert asked(taken(f"harmful:xstest_unsafe@{path}")) == [("b?", ["contrast_homonyms"]), ("c?", ["contrast_homonyms"])]


def test_the_unsafe_half_of_the_real_xstest(shared: Path) -> None:
    records = taken(f"harmful:xstest_unsafe@{shared}/xstest/prompts.jsonl")
    assert len(records) == 200 and {record.extra["label"] for record in records} == {"unsafe"}


def test_lengths_and_names() -> None:
    lengths = {"harmbench": 512, "sorry_bench": 1024, "jailbreakbench": 150, "xstest_unsafe": 256}
    assert {name: answer_length(f"harmful:{name}@x") for name in lengths} == lengths
    assert set(SLICES["harmful"]) - lengths.keys() == {"hex_phi", "harmbench_contextual", "strongreject", "or_bench_toxic"}
    specs = [f"harmful:{name}@x.csv" for name in SLICES["harmful"]]
    assert set_names(specs) == [f"harmful-{name}" for name in SLICES["harmful"]]
    assert answer_length("harmful@x.csv") == 512 and answer_length("or_bench@x.csv") == 256


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"wug": "x"}, "no field 'prompt' .it has: 1 other"),
        ({"turns": []}, "field 'turns' must hold one text, not 0"),
        ({"turns": ["a", "b"]}, "field 'turns' must hold one text, not 2"),
        ({"turns": [7]}, "field 'turns' must be text, not int"),
        ({"Behavior": None}, "field 'Behavior' must be text, not null"),
        ({"prompt": "p", "ContextString": 7}, "field 'ContextString' must be text, not int"),
        ({"prompt": "p", "category": 1.5}, "field 'category': expected names"),
        ({"prompt": "p\ud800"}, "field 'prompt' is not valid Unicode"),
    ],
)
def test_rows_that_cannot_be_read(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_columns("harmful", row, need_output=False)


def test_prompts_alone_are_not_trained_on(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "p"}])
    for task in ("harmful", "or_bench"):
        with pytest.raises(InputError, match=f"{task} holds prompts only, so it cannot be trained on"):
            load_records(f"{task}@{path}", "config.data.attack", need_output=True)
