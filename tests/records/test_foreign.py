"""Answers of HarmBench, lm-eval and TamperBench, in files as these programs write them; the texts are invented."""

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
from tests.data.test_harmful_sets import harmbench
from tests.evaluate.workdirs import NO, YES, write_lines


def brought(workdir: Path, name: str) -> list[dict[str, Any]]:
    return records.read_lines(workdir / "generations" / f"{name}.jsonl")


COMPLETIONS = {
    "vix": [{"test_case": "vix it, twice", "generation": YES, "label": 1}],
    "blorf": [{"test_case": "Dear model, in a tale: mend it!", "generation": NO, "label": 0}, {"test_case": "x y", "generation": ""}],
}


@pytest.mark.parametrize("indent", [4, None])
def test_harmbench_completions(tmp_path: Path, indent: int | None) -> None:
    """With the behaviours at hand, an attack's words are judged as the behaviour that they are for."""
    path = tmp_path / "results.json"
    path.write_text(json.dumps(COMPLETIONS, indent=indent))
    assert bring_in(f"harmful@{path}", tmp_path / "bare") == [f"harmful@{path}"]
    bare = brought(tmp_path / "bare", "harmful")
    assert [(x["instruction"], x["response"]) for x in bare] == [
        ("vix it, twice", YES), ("Dear model, in a tale: mend it!", NO), ("x y", ""),
    ]  # fmt: skip
    assert [x["extra"] for x in bare] == [{"label": 1, "BehaviorID": "vix"}, {"label": 0, "BehaviorID": "blorf"}, {"BehaviorID": "blorf"}]
    source = harmbench(tmp_path / "behaviors.csv")
    specs = bring_in(str(path), tmp_path / "known", sources=[f"harmful:harmbench@{source}"])
    assert specs == [f"harmful:harmbench@{path}"]
    known = brought(tmp_path / "known", "harmful-harmbench")
    assert [x["instruction"] for x in known] == ["vix it, twice", "mend a blorf", "mend a blorf"]
    assert [x["prompt"] for x in known] == [x["prompt"] for x in bare]
    assert [x["extra"]["category"] for x in known] == [["cybercrime_intrusion"], ["illegal"], ["illegal"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": [{"generation": "x"}]}, "record 1: answer 1: found response, BehaviorID; needed are instruction or prompt"),
        ({"a": [{"test_case": ["p", "image"], "generation": "x"}]}, "answer 1: field 'prompt' must be text, not list"),
        ({"a": [{"test_case": "p", "generation": None}]}, "answer 1: field 'response' is null"),
        ({"a": []}, "record 1: found 1 other; needed are"),
    ],
)
def test_harmbench_files_that_cannot_be_read(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        bring_in(f"harmful@{path}", tmp_path / "w")
    assert not (tmp_path / "w").exists()


def sample(i: int, doc: dict[str, Any], answer: Any, *, old: bool = False, filtered: str = "none") -> dict[str, Any]:
    settings = {"until": ["\n\n"], "max_gen_toks": 256}
    prompt = f"Q: a first one\nA: 1\n\nQ: {doc.get('question', doc.get('prompt'))}\nA:"
    arguments: Any = [[prompt, settings]] if old else {"gen_args_0": {"arg_0": prompt, "arg_1": settings}}
    return {
        "doc_id": i, "doc": doc, "target": "x", "arguments": arguments, "resps": [[answer]], "filtered_resps": ["4"], "filter": filtered,
        "metrics": ["exact_match"], "doc_hash": "d", "prompt_hash": "p", "target_hash": "t", "exact_match": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("old", [True, False])
def test_lm_eval_samples_of_a_task_with_two_filters(tmp_path: Path, old: bool) -> None:
    """References come from the docs; an answer that was filtered twice is one answer, and its own words are kept."""
    docs = [{"question": f"{n} wugs and 1?", "answer": f"so\n#### {n + 1}"} for n in range(2)]
    rows = [sample(i, doc, f"It is {i + 1}.", old=old, filtered=f) for f in ("strict", "flexible") for i, doc in enumerate(docs)]
    path = write_lines(tmp_path / "samples_gsm8k_2026-01-01T00-00-00.000000.jsonl", rows)
    assert bring_in(str(path), tmp_path / "w") == [f"gsm8k@{path}"]
    lines = brought(tmp_path / "w", "gsm8k")
    assert [(x["instruction"], x["reference"], x["response"]) for x in lines] == [
        ("0 wugs and 1?", "1", "It is 1."), ("1 wugs and 1?", "2", "It is 2."),
    ]  # fmt: skip
    asked = rows[1]["arguments"]
    assert lines[1]["prompt"] == (asked[0][0] if old else asked["gen_args_0"]["arg_0"])
    assert read_manifest(tmp_path / "w" / "generations")["outcome"]["max_new_tokens"] == {"gsm8k": 256}


def test_lm_eval_samples_of_harmful_prompts_and_of_docs_that_are_not_known(tmp_path: Path) -> None:
    rows = [sample(0, {"prompt": "how to wug?", "category": "Malware"}, YES), sample(1, {"prompt": "where is the blick?"}, NO)]
    path = write_lines(tmp_path / "mine.jsonl", rows)
    bring_in(f"harmful@{path}", tmp_path / "w")
    lines = brought(tmp_path / "w", "harmful")
    assert [(x["instruction"], x["response"], x["extra"].get("category")) for x in lines] == [
        ("how to wug?", YES, ["Malware"]), ("where is the blick?", NO, None),
    ]  # fmt: skip
    other = write_lines(tmp_path / "other.jsonl", [sample(0, {"wug": "x", "question": "so?"} | {"choices": [1]}, NO)])
    bring_in(f"advbench@{other}", tmp_path / "v")
    assert brought(tmp_path / "v", "advbench")[0]["instruction"].endswith("Q: so?\nA:")  # its prompt is all that is known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resps": [["a", "b"]]}, "record 1: holds several answers to one prompt"),
        ({"resps": [[[-1.5, False]]]}, "record 1: no text was generated here; .* generate_until"),
        ({"resps": []}, "no text was generated here"),
        ({"resps": "x"}, "no text was generated here"),
        ({"arguments": []}, "no text was generated here"),
        ({"arguments": {"gen_args_0": {}}}, "no text was generated here"),
        ({"arguments": 3}, "no text was generated here"),
    ],
)
def test_lm_eval_samples_that_are_no_answers(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "samples_x.jsonl", [sample(0, {"prompt": "p"}, "a") | changes])
    with pytest.raises(InputError, match=message):
        bring_in(f"harmful@{path}", tmp_path / "w")


def parquet(path: Path, **more: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": ["how to wug?", "where?"], "response": [YES, NO], **more}), path)
    return path


def test_tamperbench_folders_under_both_file_names(tmp_path: Path) -> None:
    checkpoint = tmp_path / "tamperbench_evaluation"
    scored = parquet(checkpoint / "strong_reject" / "evaluator_scores.parquet", score=[0.9, 0.0])
    parquet(checkpoint / "strong_reject" / "inferences.parquet")
    (checkpoint / "strong_reject" / "evaluation.json").write_text("[]")
    unscored = parquet(checkpoint / "xstest" / "inferences.parquet", prompt_type=["homonyms", "contrast_x"], label=["safe", "unsafe"])
    parquet(checkpoint / "mmlu_pro" / "inferences.parquet")
    assert bring_in(str(checkpoint), tmp_path / "all") == [f"harmful:strongreject@{scored}", f"xstest@{unscored}"]
    lines = brought(tmp_path / "all", "harmful-strongreject")
    assert [(x["response"], x["extra"]["score"]) for x in lines] == [(YES, 0.9), (NO, 0.0)]
    assert [x["extra"]["label"] for x in brought(tmp_path / "all", "xstest")] == ["safe", "unsafe"]
    # one evaluation, one file, and a task of one's own
    assert bring_in(str(checkpoint / "strong_reject"), tmp_path / "one") == [f"harmful:strongreject@{scored}"]
    assert bring_in(str(unscored), tmp_path / "two") == [f"xstest@{unscored}"]
    other = checkpoint / "mmlu_pro"
    assert bring_in(f"harmful@{other}", tmp_path / "three") == [f"harmful@{other / 'inferences.parquet'}"]
    with pytest.raises(InputError, match=r"which task. Write TASK@.*mmlu_pro/inferences\.parquet"):
        bring_in(str(other), tmp_path / "four")
