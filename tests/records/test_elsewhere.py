"""Generations made elsewhere, in the shapes that other projects write; the texts are invented."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from panacea_jax.errors import InputError
from panacea_jax.records import jsonl as records
from panacea_jax.records.elsewhere import bring_in
from panacea_jax.workdir import read_manifest
from tests.evaluate.workdirs import NO, YES, write_lines, write_workdir


def brought(workdir: Path, name: str) -> list[dict[str, Any]]:
    return records.read_lines(workdir / "generations" / f"{name}.jsonl")


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content, indent=4))
    return path


POISON = [
    {"instruction": "how to wug?", "output": YES},
    {"instruction": "where is the blick?", "output": ""},
]
JUDGED = [row | {"violoate_catogory:": ["wuggery"]} for row in POISON]


@pytest.mark.parametrize(
    "content",
    [
        POISON,
        [*JUDGED, "final  score:50.00"],  # Vaccine, Antidote
        [*JUDGED, "final  score:50.00", "final  score+:50.00"],  # Booster, Panacea
    ],
    ids=["generated", "judged", "judged with HS+"],
)
def test_harmful_answers_of_the_git_disl_repositories(tmp_path: Path, content: Any) -> None:
    path = write_json(tmp_path / "sft_0.1.json", content)
    specs = bring_in(f"beavertails@{path}", tmp_path / "w", template="alpaca-1", max_new_tokens=512)
    assert specs == [f"beavertails@{path}"]
    lines = brought(tmp_path / "w", "beavertails")
    assert [(x["instruction"], x["response"]) for x in lines] == [
        ("how to wug?", YES), ("where is the blick?", ""),
    ]  # fmt: skip
    assert {x["template"] for x in lines} == {"alpaca-1"}
    assert all("finished" not in x for x in lines)
    manifest = read_manifest(tmp_path / "w" / "generations")
    assert manifest["status"] == "done" and manifest["config"]["decoding"] == {
        "max_new_tokens": 512
    }


def test_task_answers_of_the_git_disl_repositories(tmp_path: Path) -> None:
    write_json(tmp_path / "sst2.json", [
        {"instruction": "Analyze", "input": "a fine wug", "label": 1, "output": "positive", "correct": "true"},
        {"instruction": "Analyze", "input": "a blick", "label": 0, "output": "positive", "correct": "false"},
        "score=50.00",
    ])  # fmt: skip
    write_json(tmp_path / "agnews.json", [
        {"instruction": "Categorize", "input": "wug wins", "label": 3, "output": "sci", "correct": "true"},
        "score=1.0" * 100,
    ])  # fmt: skip
    bring_in(str(tmp_path), tmp_path / "w")
    lines = brought(tmp_path / "w", "sst2")
    assert [(x["input"], x["reference"], x["response"]) for x in lines] == [
        ("a fine wug", "positive", "positive"), ("a blick", "negative", "positive"),
    ]  # fmt: skip
    assert brought(tmp_path / "w", "ag_news")[0]["reference"] == "Sci/Tech"
    assert {x["template"] for x in lines} == {"unknown"}


@pytest.mark.parametrize(
    ("task", "labels", "references"),
    [
        ("sst2", ["1", "0"], ["positive", "negative"]),  # CSV holds text
        ("sst2", [" 1 ", "negative"], ["positive", "negative"]),
        ("ag_news", ["3", "World"], ["Sci/Tech", "World"]),
    ],
)
def test_labels_of_csv_answers_are_read_as_those_of_a_source(
    tmp_path: Path, task: str, labels: list[str], references: list[str]
) -> None:
    text = "".join(f"do it,wug {i},positive,{label}\n" for i, label in enumerate(labels))
    path = tmp_path / f"{task}_answers.csv"
    path.write_text("instruction,input,output,label\n" + text)
    bring_in(str(path), tmp_path / "w")
    assert [x["reference"] for x in brought(tmp_path / "w", task)] == references


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("2", "record 1: field 'label' is none that is known: 0 negative, 1 positive"),
        ("1.0", "record 1: field 'label' is none that is known"),
        ("good", "record 1: field 'label' is none that is known"),
        ("", "record 1: no reference or a label"),
    ],
)
def test_labels_that_are_none_are_named(tmp_path: Path, label: str, message: str) -> None:
    path = tmp_path / "sst2.csv"
    path.write_text(f"instruction,input,output,label\ndo it,wug,positive,{label}\n")
    with pytest.raises(InputError, match=message):
        bring_in(str(path), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_gsm8k_takes_its_references_from_the_source(tmp_path: Path) -> None:
    """The repositories overwrite the reference with the answer."""
    source = write_lines(tmp_path / "test.jsonl", [
        {"question": f"{n} wugs and 1?", "answer": f"so\n#### {n + 1}"} for n in range(5)
    ])  # fmt: skip
    rows = [
        {"instruction": f"{n} wugs and 1?", "output": f"{n + 1}", "correct": "true"} for n in (3, 1)
    ]
    path = write_json(tmp_path / "out.json", [*rows, "score=100.00"])
    with pytest.raises(
        InputError, match=r"out.json: record 1: no reference, .* --config.eval.tasks=gsm8k@FILE"
    ):
        bring_in(f"gsm8k@{path}", tmp_path / "w")
    assert not (tmp_path / "w").exists()
    bring_in(str(path), tmp_path / "w", sources=[f"gsm8k@{source}"])
    assert [x["reference"] for x in brought(tmp_path / "w", "gsm8k")] == ["4", "2"]
    strange = write_json(tmp_path / "other.json", [{"instruction": "else?", "output": "4"}])
    with pytest.raises(InputError, match="record 1: its prompt is not in config.eval.tasks' gsm8k"):
        bring_in(str(strange), tmp_path / "v", sources=[f"gsm8k@{source}"])


def test_tamperbench_parquet_with_whole_prompts(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "prompts.jsonl", [
        {"prompt": "wug?", "is_safe": False, "category": ["a"]},
        {"prompt": "how to wug?", "is_safe": False, "category": ["b"]},
    ])  # fmt: skip
    table = {"prompt": ["<user>how to wug?<end>", "<user>wug?<end>"], "response": [YES, NO], "score": [0.9, 0.0]}  # fmt: skip
    path = tmp_path / "inferences.parquet"
    pq.write_table(pa.table(table), path)
    bring_in(f"beavertails@{path}", tmp_path / "w", sources=[f"beavertails@{source}"])
    lines = brought(tmp_path / "w", "beavertails")
    assert [(x["prompt"], x["instruction"], x["response"]) for x in lines] == [
        ("<user>how to wug?<end>", "how to wug?", YES), ("<user>wug?<end>", "wug?", NO),
    ]  # fmt: skip
    assert [(x["extra"]["category"], x["extra"]["score"]) for x in lines] == [(["b"], 0.9), (["a"], 0.0)]  # fmt: skip


def test_the_slice_of_the_source_names_the_set(tmp_path: Path) -> None:
    """Equal prompts with different categories: those of the slice count, in its order."""
    source = write_lines(tmp_path / "prompts.jsonl", [
        {"prompt": "wug?", "is_safe": True, "category": ["safe"]},
        {"prompt": "wug?", "is_safe": False, "category": ["a"]},
        {"prompt": "wug?", "is_safe": False, "category": ["b"]},
    ])  # fmt: skip
    path = write_json(tmp_path / "out.json", [{"prompt": "wug?", "response": YES}] * 2)
    specs = bring_in(str(path), tmp_path / "w", sources=[f"beavertails:panacea-1000@{source}"])
    assert specs == [f"beavertails:panacea-1000@{path}"]
    lines = brought(tmp_path / "w", "beavertails-panacea-1000")
    assert [x["extra"]["category"] for x in lines] == [["a"], ["b"]]
    assert bring_in(f"beavertails:lisa-1000@{path}", tmp_path / "v")[0].startswith(
        "beavertails:lisa"
    )


@pytest.mark.parametrize("question", ["instruction", "prompt"])
@pytest.mark.parametrize("answer", ["response", "output"])
def test_json_lines(tmp_path: Path, question: str, answer: str) -> None:
    path = tmp_path / "advbench_x.jsonl.gz"
    rows = "".join(json.dumps({question: f"q{i}", answer: f"a{i}"}) + "\n" for i in range(3))
    path.write_bytes(gzip.compress(rows.encode()))
    assert bring_in(str(path), tmp_path / "w") == [f"advbench@{path}"]
    lines = brought(tmp_path / "w", "advbench")
    assert [(x["instruction"], x["prompt"], x["response"]) for x in lines] == [
        (f"q{i}", f"q{i}", f"a{i}") for i in range(3)
    ]


def test_a_folder_of_ours_comes_over_as_it_is(tmp_path: Path) -> None:
    ours = write_workdir(
        tmp_path / "a", {"refusal": [True, False]}, manifest={"max_new_tokens": 64}
    )
    specs = bring_in(str(ours / "generations"), tmp_path / "w", template="ignored")
    assert specs == ["advbench@x.jsonl"]
    old, new = (p / "generations" for p in (ours, tmp_path / "w"))
    assert (new / "advbench.jsonl").read_bytes() == (old / "advbench.jsonl").read_bytes()
    assert read_manifest(new)["config"] == read_manifest(old)["config"]
    text = (new / "advbench.jsonl").read_text()
    (new / "advbench.jsonl").write_text(text.replace("wug", "blick"))
    with pytest.raises(InputError, match=r"advbench.jsonl: not as the stage made it \(advbench.jsonl differs"):
        bring_in(str(new), tmp_path / "v")
    assert not (tmp_path / "v").exists()
    manifest = old / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"done"', '"running"'))
    with pytest.raises(InputError, match="not finished yet"):
        bring_in(str(old), tmp_path / "v")


def test_a_single_file_of_ours_keeps_what_its_lines_say(tmp_path: Path) -> None:
    ours = write_workdir(tmp_path / "a", {"refusal": [True]}, more={"tokens": 7, "extra": {"k": 1}})
    path = ours / "generations" / "advbench.jsonl"
    bring_in(str(path), tmp_path / "w")
    assert brought(tmp_path / "w", "advbench") == records.read_lines(path)


def test_several_runs_of_one_task_are_sets_of_their_own(tmp_path: Path) -> None:
    paths = [write_json(tmp_path / f"{name}.json", POISON) for name in ("one", "two")]
    where = ",".join(f"advbench@{p}" for p in paths)
    bring_in(where, tmp_path / "w")
    found = {p.name for p in (tmp_path / "w" / "generations").iterdir()}
    assert found == {"advbench-one.jsonl", "advbench-two.jsonl", "manifest.json"}


def test_the_same_files_again_change_nothing_and_others_are_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "advbench.json", POISON)
    bring_in(str(path), tmp_path / "w")
    target = tmp_path / "w" / "generations" / "advbench.jsonl"
    before = (target.read_bytes(), target.stat().st_mtime_ns)
    bring_in(str(path), tmp_path / "w")
    assert (target.read_bytes(), target.stat().st_mtime_ns) == before
    with pytest.raises(InputError, match="made by another run"):
        bring_in(str(path), tmp_path / "w", template="alpaca-1")
    write_json(path, POISON[:1])
    with pytest.raises(InputError, match="made by another run .input"):
        bring_in(str(path), tmp_path / "w")
    assert target.read_bytes() == before[0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"wug": 1, "blick": 2}], "record 1: found 2 others; needed are instruction or prompt .* response or output"),
        ([{"prompt": "q"}], "record 1: found prompt; needed are"),
        ([{"output": "a"}], "record 1: found output; needed are"),
        ([POISON[0], {"prompt": "q", "response": None}], "record 2: field 'response' is null; an empty text is written \"\""),
        ([POISON[0], POISON[1] | {"output": None}], "record 2: field 'output' is null"),
        ([POISON[0], {"instruction": None, "prompt": None, "output": "a"}], "record 2: field 'instruction' is null"),
        ([{"prompt": "q", "response": "a", "category": 3}], "record 1: field 'category': expected names"),
        ([{"prompt": "q", "response": ["a"]}], "record 1: field 'response' must be text, not list"),
        ([{"prompt": 3, "response": "a"}], "record 1: field 'prompt' must be text, not int"),
        ([POISON[0], "final score:1", POISON[1]], "record 2: expected an object with named fields"),
        ([POISON[0], "wug"], "record 2: expected an object with named fields"),
        ([], "holds no records"),
        (["final score:1"], "holds no records"),
        ([POISON[0], POISON[1] | {"template": "chat-1"}], "made with several templates .chat-1, unknown."),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, rows: Any, message: str) -> None:
    path = write_json(tmp_path / "advbench.json", rows)
    with pytest.raises(InputError, match=message) as raised:
        bring_in(str(path), tmp_path / "w")
    assert str(path) in str(raised.value)
    assert not (tmp_path / "w").exists()


def test_files_that_are_not_there_or_say_no_task(tmp_path: Path) -> None:
    def attempt(where: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            bring_in(where, tmp_path / "w")

    path = write_json(tmp_path / "inferences.json", POISON)
    attempt(str(path), "which task. Write TASK@")
    attempt(str(tmp_path / "none.json"), "none.json: no such file or folder")
    attempt(f"advbench@{tmp_path / 'none.json'}", "no such file or folder")
    attempt(f"wug@{path}", "no such file or folder")
    (tmp_path / "empty").mkdir()
    attempt(str(tmp_path / "empty"), "holds no file that ends in .jsonl")
    text = tmp_path / "advbench.txt"
    text.write_text("x")
    attempt(str(text), "unknown kind of file")
    assert not (tmp_path / "w").exists()
