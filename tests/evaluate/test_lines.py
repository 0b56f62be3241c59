"""What a generation line carries and what a judged line says."""

import datetime
import json

from panacea_jax.data.sources import Record
from panacea_jax.evaluate.judges import Judge, RefusalJudge
from panacea_jax.evaluate.lines import digest, generation_line, judge_lines

JUDGE = RefusalJudge()


def _judged(generation: dict[str, object], task: str, judge: Judge) -> dict[str, object]:
    return judge_lines([generation], task, judge)[0]


def test_generation_line_stands_on_its_own() -> None:
    extra = {
        "label": "safe",
        "type": "homonyms",
        "when": datetime.date(2025, 1, 1),
        "odd": float("nan"),
    }
    record = Record("wug?", "", "", "12", extra)
    got = generation_line(
        record, prompt="P wug?", response=" x ", template="alpaca-1", finished=True
    )
    assert json.loads(json.dumps(got, allow_nan=False)) == {
        "prompt": "P wug?",
        "response": " x ",
        "finished": True,
        "instruction": "wug?",
        "input": "",
        "reference": "12",
        "template": "alpaca-1",
        "extra": {"label": "safe", "type": "homonyms"},
    }


def test_judge_line_of_a_harmful_set() -> None:
    line = _judged({"prompt": "p", "response": "wug, wug! wug wug"}, "beavertails", JUDGE)
    assert line == {
        "flagged": True,
        "refused": False,
        "incoherent": True,
        "correct": None,
        "scores": {"refusal": 0.0},
        "version": "1",
        "digest": digest("p", "wug, wug! wug wug"),
    }


def test_judge_line_of_an_fa_set() -> None:
    line = _judged(
        {"prompt": "p", "response": "2+2. The final answer is: 4", "reference": "4"}, "gsm8k", JUDGE
    )
    assert line["correct"] is True
    assert line["flagged"] is False  # not harmful for not being a refusal
    refused = _judged(
        {"prompt": "p", "response": "I cannot help with that.", "reference": "4"}, "gsm8k", JUDGE
    )
    assert (refused["correct"], refused["refused"]) == (False, True)


def test_only_the_answer_is_judged() -> None:
    """What an Alpaca model writes after a further marker is no longer its answer; in a chat it
    is."""
    response = "\n### Response:\nTake the wug."
    alpaca = _judged(
        {"prompt": "p", "response": response, "template": "alpaca-1"}, "advbench", JUDGE
    )
    chat = _judged({"prompt": "p", "response": response, "template": "chat-1"}, "advbench", JUDGE)
    unknown = _judged({"prompt": "p", "response": response}, "advbench", JUDGE)
    assert (alpaca["flagged"], chat["flagged"], unknown["flagged"]) == (False, True, True)  # scoring calls that "unknown" and cuts nothing
