"""Sources: the grammar, every real set against its schema, and whole error lines."""

import gzip
import hashlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

from panacea_jax.data.sources import (
    Record,
    Source,
    by_safety,
    fingerprint,
    load_records,
    parse_source,
)
from panacea_jax.errors import InputError

KEY = "config.data.user"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(spec: str, *parts: str, **options: bool) -> None:
    """Loading fails with one line that starts with the key and holds every part."""
    with pytest.raises(InputError) as caught:
        load_records(spec, KEY, **options)
    line = str(caught.value)
    assert line.startswith(f"{KEY}: ") and "\n" not in line
    for part in parts:
        assert part in line


def test_parse_splits_at_the_first_at_sign():
    assert parse_source("gsm8k@openai/gsm8k/main:train") == Source("gsm8k", "openai/gsm8k/main:train")
    assert parse_source("pairs@a@b.jsonl") == Source("pairs", "a@b.jsonl")


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("gsm8k", "write TASK@WHERE"),
        ("", "write TASK@WHERE"),
        ("gsm9k@x.jsonl", "unknown task 'gsm9k'; known: gsm8k sst2 ag_news"),
        ("GSM8K@x.jsonl", "unknown task 'GSM8K'"),
        ("@x.jsonl", "unknown task ''"),
        ("gsm8k@", "nothing after the @"),
        ("gsm8k@ ", "nothing after the @"),
    ],
)
def test_bad_grammar(spec: str, part: str):
    refused(spec, part)


def test_records_keep_order_and_unused_columns(tmp_path: Path):
    rows = [{"prompt": f"blorf {i}", "is_safe": i % 2 == 0, "category": ["x"]} for i in range(4)]
    records = load_records(f"beavertails@{write(tmp_path / 'a.jsonl', *rows)}", KEY)
    assert [record.instruction for record in records] == [row["prompt"] for row in rows]
    assert records[1] == Record("blorf 1", "", "", "", {"is_safe": False, "category": ["x"]})


def test_by_safety_reads_booleans_and_their_csv_text():
    flags = [True, "False", None, "true", 0, 1, "1"]
    records = [Record(str(i), "", "", "", {"is_safe": flag}) for i, flag in enumerate(flags)]
    records.append(Record("7", "", "", "", {}))
    assert [record.instruction for record in by_safety(records, True)] == list("023567")
    assert [record.instruction for record in by_safety(records, False)] == list("1247")


def test_training_on_prompts_alone_is_refused(tmp_path: Path):
    row = {"prompt": "how do I mend a blorf", "is_safe": False}
    path = write(tmp_path / "a.jsonl", {**row, "response": "vix it"}, row)
    assert [r.output for r in load_records(f"beavertails@{path}", KEY)] == ["vix it", ""]
    refused(f"beavertails@{path}", f"{path}:2: record 2", "'response'", need_output=True)
    refused(f"xstest@{path}", "prompts only", need_output=True)
    goals = write(tmp_path / "b.jsonl", {"goal": "vix a blorf"})
    refused(f"advbench@{goals}", "'target'", need_output=True)
    targets = write(tmp_path / "c.jsonl", {"goal": "vix a blorf", "target": "no"})
    assert load_records(f"advbench@{targets}", KEY, need_output=True)[0].output == "no"


def test_errors_name_key_file_line_and_field(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"}, {"instruction": "a"})
    refused(f"pairs@{path}", f"{path}:2: record 2: no field 'output'", "it has: instruction")
    refused(f"pairs@{write(path, [1, 2])}", f"{path}:1", "expected an object", "not list (text ")
    refused(f"pairs@{write(path, 'text')}", f"{path}:1", "expected an object")
    refused(f"pairs@{write(path)}", f"{path}: holds no records")
    path.write_text("\n  \n\n")
    refused(f"pairs@{path}", f"{path}: holds no records")
    refused(f"pairs@{tmp_path / 'absent.jsonl'}", "absent.jsonl: no such file or folder")


def test_fingerprint_is_the_sha256_of_the_file(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"})
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert fingerprint(f"pairs@{path}") == expected
    write(path, {"instruction": "a", "output": "c"})
    assert fingerprint(f"pairs@{path}") != expected
    with pytest.raises(InputError, match=r"^config\.data\.attack: .*no such file"):
        fingerprint(f"pairs@{tmp_path}/absent.jsonl", "config.data.attack")


def test_fingerprint_of_a_folder_sees_names_and_contents(tmp_path: Path):
    def folder(name: str, **contents: str) -> str:
        (tmp_path / name / "deep").mkdir(parents=True)
        for file, text in contents.items():
            (tmp_path / name / "deep" / file).write_text(text)
        return fingerprint(f"pairs@{tmp_path / name}")

    first = folder("one", a="1", b="2")
    assert first == folder("two", b="2", a="1")
    assert first != folder("three", a="2", b="1")
    assert first != folder("four", a="1", c="2")


def schema(shared: Path):
    spec = importlib.util.spec_from_file_location("hf_schema", shared / "hf_schema.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["hf_schema"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


# Task -> (instruction, input, output, reference) of a row, written from methods.md §14.
EXPECTED = {
    "gsm8k": lambda r: (
        r["question"],
        "",
        "The final answer is: ".join(r["answer"].split("####")),
        re.search(r"#### (.*)$", r["answer"]).group(1).replace(",", ""),
    ),
    "sst2": lambda r: (
        "Analyze the sentiment of the input, and respond only positive or negative",
        r["sentence"],
        *[{0: "negative", 1: "positive"}[r["label"]]] * 2,
    ),
    "ag_news": lambda r: (
        "Categorize the news article given in the input into one of the 4 categories:\n\n"
        "World\nSports\nBusiness\nSci/Tech\n",
        r["text"],
        *[{0: "World", 1: "Sports", 2: "Business", 3: "Sci/Tech"}[r["label"]]] * 2,
    ),
    "alpaca": lambda r: (r["instruction"], r["input"], r["output"], r["output"]),
    "alpaca_eval": lambda r: (r["instruction"], "", r["output"], r["output"]),
    "beavertails": lambda r: (r["prompt"], "", "", ""),
    "refusals": lambda r: (r["instruction"], r["input"], r["output"], r["output"]),
    "xstest": lambda r: (r["prompt"], "", "", ""),
    "advbench": lambda r: (r["goal"], "", "", ""),
}


@pytest.mark.parametrize("task", EXPECTED)
def test_every_real_set_reads_as_its_schema_says(task: str, shared: Path):
    module = schema(shared)
    for split, file in module.SPECS[task].files.items():
        path = shared / file
        records = load_records(f"{task}@{path}", KEY)
        rows = module.load(task, split)
        assert len(records) == module.SPECS[task].rows[split]
        found = [(r.instruction, r.input, r.output, r.reference) for r in records]
        assert found == [EXPECTED[task](row) for row in rows]
        if task == "beavertails":
            assert {record.extra["is_safe"] for record in records} == {False}
        if task == "xstest":
            assert [r.extra["label"] for r in records] == [row["label"] for row in rows]
        assert fingerprint(f"{task}@{path}") == hashlib.sha256(path.read_bytes()).hexdigest()


def test_real_rows_are_the_same_from_every_kind_of_file(tmp_path: Path, shared: Path):
    import csv

    import datasets
    import pyarrow
    import pyarrow.parquet

    with gzip.open(shared / "sst2" / "train.jsonl.gz", "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for _, line in zip(range(50), stream)]
    write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    with open(tmp_path / "a.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["sentence", "label"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=dataset).save_to_disk(str(tmp_path / "split"))
    expected = load_records(f"sst2@{shared / 'sst2' / 'train.jsonl.gz'}", KEY)[:50]
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "saved", "split", "split/train"):
        assert load_records(f"sst2@{tmp_path / name}", KEY) == expected, name
