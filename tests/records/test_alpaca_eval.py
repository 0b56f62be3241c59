"""The file that AlpacaEval's own command line takes, from real prompts and invented answers."""

import json
from pathlib import Path

from panacea_jax.data.sources import Record
from panacea_jax.evaluate.lines import generation_line
from panacea_jax.records.alpaca_eval import write_model_outputs
from panacea_jax.records.jsonl import encode_line
from tests import runs


def test_one_entry_a_line_in_order_with_the_scored_part_of_the_answer(tmp_path: Path) -> None:
    texts = ["vix it\n\n### Response:\nmore", " gandle “blorf” ", ""]
    lines = [
        generation_line(
            Record(f"mend blorf {i}", "", "reference", "reference", {"dataset": "helpful_base", "generator": "other"}),
            prompt=f"rendered {i}", response=text, template="alpaca-1", finished=True,
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip
    generations = tmp_path / "alpaca_eval-panacea.jsonl"
    generations.write_bytes(b"".join(map(encode_line, lines)))
    path = write_model_outputs(generations, "panacea_jax-runs")
    assert path == tmp_path / "alpaca_eval-panacea.model_outputs.json"
    assert json.loads(path.read_text("utf-8")) == [
        {
            "dataset": "helpful_base",
            "instruction": f"mend blorf {i}",
            "output": output,
            "generator": "panacea_jax-runs",
        }
        for i, output in enumerate(["vix it", "gandle “blorf”", ""])
    ]


def test_generate_writes_it(tmp_path: Path) -> None:
    place = runs.make_place(tmp_path / "place")
    rows = [{"instruction": f"w{i} w{i + 1}", "output": "no", "dataset": "d"} for i in range(703)]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = (f"alpaca_eval:panacea@{source}", place.spec("test"))
    workdir = tmp_path / "run"
    flags = place.flags(f"--config.eval.tasks={tasks}", f"--workdir={workdir}")
    assert runs.panacea("generate", *flags) == 0
    folder = workdir / "generations"
    assert {p.name for p in folder.iterdir()} == {
        "manifest.json",
        "alpaca_eval-panacea.jsonl",
        "alpaca_eval-panacea.model_outputs.json",
        "pairs.jsonl",
    }
    outputs = json.loads((folder / "alpaca_eval-panacea.model_outputs.json").read_text("utf-8"))
    assert [o["instruction"] for o in outputs] == ["w701 w702", "w702 w703"]
    answers = [
        json.loads(line)
        for line in (folder / "alpaca_eval-panacea.jsonl").read_text("utf-8").splitlines()
    ]
    assert [o["output"] for o in outputs] == [a["response"].strip() for a in answers]
    assert {o["generator"] for o in outputs} == {"panacea_jax-run"}
    assert {o["dataset"] for o in outputs} == {"d"}
