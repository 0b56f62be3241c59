"""What a run says at its end."""

import json

import pytest

from panacea_jax.config import get_config
from panacea_jax.stages.phases import Phase, Phases
from panacea_jax.stages.summary import show_summary, write_summary
from tests.evaluate.workdirs import generations, judgements, write_lines, write_workdir
from tests.runs import panacea

HOSTILE = "\x1b[2J\x1b]0;pwned\x07[red]:smile:\u202e" + "x" * 500


@pytest.fixture
def workdir(tmp_path):
    """A run that healed an adapter, and whose model says hostile things."""
    write_workdir(
        tmp_path, {"refusal": [True, False, False]}, manifest={"max_new_tokens": 64, "adapter": "w/heal/adapter"},
        more={"response": HOSTILE, "instruction": "how to\n\x1b[31mwug " + "y" * 200},
    )  # fmt: skip
    lines = generations(["", "4"])
    write_lines(tmp_path / "generations" / "gsm8k.jsonl", lines)
    verdicts = [{**j, "correct": i == 1, "refused": False} for i, j in enumerate(judgements(lines, [False] * 2))]
    write_lines(tmp_path / "judgements" / "gsm8k.refusal.jsonl", verdicts)
    path = tmp_path / "generations" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["eval"]["tasks"] = ["advbench@x.jsonl", "gsm8k@y.jsonl"]
    path.write_text(json.dumps(manifest))
    assert panacea("score", f"--workdir={tmp_path}") == 0
    for stage in ("finetune", "heal"):
        (tmp_path / stage / "adapter").mkdir(parents=True)
        (tmp_path / stage / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "finetune" / "epsilon.safetensors").write_bytes(b"")
    return tmp_path


def summarise(workdir, capsys, **changes):
    config = get_config()
    config.eval.tasks = ("advbench@x.jsonl", "gsm8k@y.jsonl")
    config.heal.defence.name = "realign"
    config.update_from_flattened_dict(changes)
    phases = Phases(workdir)
    phases.passed = {
        "finetune": Phase(3723.4, calls=2, lost=1, before=True, spent={"step": 3.0, "compile": 1.0}, peak_bytes=3 * 2**29),
        "heal": Phase(before=True),
        "generate": Phase(12.2, calls=1),
    }
    phases.passed["finetune"].warnings.update({"twice \x1b[1m": 2, "both": 1})
    phases.passed["generate"].warnings.update({"both": 1})
    capsys.readouterr()
    show_summary(write_summary(config, workdir, phases, show_records=True))
    return json.loads((workdir / "summary.json").read_text()), capsys.readouterr().out


def test_scores_answers_warnings_time_and_files(workdir, capsys):
    found, out = summarise(workdir, capsys)
    scores = json.loads((workdir / "scores.json").read_text())
    assert found["scores"] == scores and found["answered_by"] == "w/heal/adapter"
    assert "scores of w/heal/adapter, by judge refusal 1" in out
    low, high = scores["sets"]["advbench"]["ci95"]["hs"]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    assert ["advbench", "HS", f"33.3 [{low:.1f}, {high:.1f}]"] in rows
    assert ["gsm8k", "FA"] in [row[:2] for row in rows] and ["gsm8k", "words"] not in [row[:2] for row in rows]
    assert "advbench: the first 2 of 3 answers" in out and "  wrong     p0  →  (empty)" in out and "  right     p1  →  4" in out
    assert found["defences"] == {"finetune": "panacea", "heal": "realign"}
    assert (found["deployed"], found["epsilon"]) == ("heal/adapter", "applied")
    assert "  heal/adapter                  the PEFT adapter to deploy, ε applied" in out
    assert ["finetune", "1:02:03", "step 75 %, compile 25 %", "1.50 GiB", "done before, in 2 calls, 1 killed call not counted"] in rows
    assert ["heal", "–", "", "", "done before by another command, not timed"] in rows
    assert ["generate", "0:00:12", "", "", ""] in rows and ["all", "1:02:16", "", "", ""] in rows
    assert r"  finetune (2 times): twice \x1b[1m" in out and "  finetune, generate: both" in out
    there = {"heal/adapter", "finetune/epsilon.safetensors", "generations", "judgements", "scores.json", "summary.json"}
    assert set(found["files"]) == there
    assert found["phases"]["finetune"]["warnings"] == {"twice \x1b[1m": 2, "both": 1}


def test_text_of_models_and_records_does_nothing(workdir, capsys):
    found, out = summarise(workdir, capsys)
    assert "\x1b" not in out and "\u202e" not in out and "\x07" not in out
    assert r"  harmful   how to \x1b[31mwug yyy" in out and r"→  \x1b[2J\x1b]0;pwned\x07[red]:smile:\u202exxx" in out
    [first, second] = found["answers"]["advbench"]
    assert (len(first["prompt"]), len(first["answer"]), first["prompt"][-1]) == (80, 160, "…")
    assert (first["verdict"], second["verdict"]) == ("harmful", "refused")


def test_without_scores_and_without_epsilon(workdir, capsys):
    found, out = summarise(workdir, capsys, **{"eval.tasks": (), "export.without_epsilon": True})
    assert found["scores"] is None and "no scores: config.eval.tasks is empty" in out
    assert found["epsilon"] == "left out" and "heal/adapter                  w WITHOUT ε, which must not be deployed" in out


def test_perplexity(workdir, capsys):
    (workdir / "perplexity.json").write_text('{"sets": {"gsm8k": {"perplexity": 7.12345}, "pairs": {"perplexity": null}}}')
    found, out = summarise(workdir, capsys, **{"eval.perplexity": True})
    assert found["perplexity"] == {"gsm8k": 7.12345, "pairs": None}
    assert "perplexity of gsm8k: 7.123\n" in out and "perplexity of pairs: beyond measure\n" in out
