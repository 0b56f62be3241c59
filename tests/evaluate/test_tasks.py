"""Scoring rules against hand-computed fixtures."""

import math
from typing import Any

import pytest

from panacea_jax.data.columns import READERS
from panacea_jax.errors import InputError
from panacea_jax.evaluate.tasks import (
    TASKS,
    answer_text,
    counts_for_over_refusal,
    extract_number,
    set_names,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The final answer is: 72", 72.0),
        ("The final answer is:  72", 72.0),  # two spaces, as "####" replaced leaves them
        ("3 of 4. The final answer is: 12, not 99", 12.0),  # the first after it
        ("The final answer is: $1,234,567.50.", 1234567.5),
        ("The final answer is: -8", -8.0),
        ("We add 2 and 3 to get 5.", 5.0),  # "5." is a number: 5.0
        ("so 20 - 5 = 15, or rather 14", 14.0),  # two answers: the last
        ("from 20-5", -5.0),  # the pattern reads the hyphen as a sign, as the references do
        ("7 apples. The final answer is: unknown", 7.0),  # else the last of all
        ("The final answer is: none", math.inf),
        ("no digits here", math.inf),
        ("", math.inf),
        ("It is 5. The final answer is: The final answer is: 6", 6.0),  # after the FIRST occurrence
        ("the final answer is: 3, 4", 4.0),  # the phrase is matched as written: here it is absent
        ("The final answer is:5 6", 6.0),  # and with its space
        ("50%", 50.0),
        (".5", 5.0),  # a leading dot is no part of the pattern
        ("007", 7.0),
    ],
)
def test_extract_number(text: str, expected: float) -> None:
    assert extract_number(text) == expected


@pytest.mark.parametrize(
    ("task", "answer", "reference", "correct", "contains"),
    [
        ("gsm8k", "The final answer is: 1,000", "1000", True, None),
        ("gsm8k", "The final answer is: 72.0", "72", True, None),
        ("gsm8k", "I do not know", "72", False, None),
        ("gsm8k", "72 and no, 73", "She has 72. The final answer is:  72", False, None),
        ("sst2", "positive", "positive", True, True),
        ("sst2", "Positive", "positive", True, True),
        ("sst2", " negative\n", "negative", True, True),
        ("sst2", "POSITIVE", "positive", False, False),
        ("sst2", "positive.", "positive", False, True),
        ("sst2", "not positive", "positive", False, True),
        ("sst2", "positive", "negative", False, False),
        ("sst2", "", "negative", False, False),
        ("ag_news", "Sci/Tech", "Sci/Tech", True, True),
        ("ag_news", "sci", "Sci/Tech", True, True),
        ("ag_news", "sci/tech", "Sci/Tech", False, True),  # no alias, but holds "sci"
        ("ag_news", "Science", "Sci/Tech", False, False),
        ("ag_news", "world", "World", True, True),
        ("ag_news", "Business\n", "Business", True, True),
        ("ag_news", "sports", "Business", False, False),
        ("pairs", "  take the wug \n", "take the wug", True, True),
        ("pairs", "Take the wug", "take the wug", False, False),
        ("pairs", "please take the wug now", "take the wug", False, True),
        ("pairs", "wug", "", False, False),
    ],
)
def test_fa_rules(
    task: str, answer: str, reference: Any, correct: bool, contains: bool | None
) -> None:
    rules = TASKS[task]
    assert rules.correct is not None
    assert rules.correct(answer, reference) is correct
    if contains is None:
        assert rules.contains is None
    else:
        assert rules.contains is not None
        assert rules.contains(answer, reference) is contains


@pytest.mark.parametrize(
    ("task", "reference"), [("gsm8k", "none"), ("sst2", "neutral"), ("ag_news", 3)]
)
def test_an_unusable_reference_is_an_error_not_a_wrong_answer(task: str, reference: Any) -> None:
    rule = TASKS[task].correct
    assert rule is not None
    with pytest.raises(InputError, match=task):
        rule("no number either", reference)


def test_answer_ends_at_the_next_alpaca_marker() -> None:
    text = " take the wug \n\n### Response:\nmore\n### Response: again"
    assert answer_text(text) == "take the wug"
    assert answer_text(text, "alpaca-1") == "take the wug"
    assert answer_text(text, "chat-0123") == text.strip()


def test_every_source_task_has_an_entry_and_published_lengths() -> None:
    assert set(TASKS) == set(READERS)
    published = {"beavertails": 512, "sst2": 200, "ag_news": 200, "gsm8k": 200, "alpaca_eval": 256}
    assert {name: TASKS[name].max_new_tokens for name in published} == published
    roles = {
        role: {name for name in TASKS if TASKS[name].role == role}
        for role in {t.role for t in TASKS.values()}
    }
    assert roles == {
        "harmful": {"beavertails", "advbench"},
        "over_refusal": {"xstest"},
        "accuracy": {"gsm8k", "sst2", "ag_news", "pairs"},
        "generation": {"alpaca", "alpaca_eval", "refusals"},
    }


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"label": "safe", "type": "homonyms"}, True),
        ({"label": "unsafe", "type": "contrast_homonyms"}, False),
        ({"type": "definitions"}, True),
        ({"type": "contrast_definitions"}, False),
        ({"extra": {"label": "safe"}}, True),
        ({"extra": {"type": "contrast_discr"}}, False),
        ({"prompt": "unlabelled"}, False),
    ],
)
def test_only_safe_prompts_count_for_over_refusal(record: dict[str, Any], expected: bool) -> None:
    assert counts_for_over_refusal(record) is expected


def test_set_names() -> None:
    specs = [
        "gsm8k@a/test.jsonl.gz",
        "pairs@x/wugs.jsonl",
        "pairs@y/wugs.csv",
        "beavertails@PKU-Alignment/BeaverTails:30k_test",
        "beavertails@saved/folder/",
        "pairs@y/with space.json.gz",
    ]
    assert set_names(specs) == [
        "gsm8k",
        "pairs-wugs",
        "pairs-wugs-2",
        "beavertails-BeaverTails-30k_test",
        "beavertails-folder",
        "pairs-with-space",
    ]


@pytest.mark.parametrize(
    "specs", [["gsm8k"], ["nonsense@x.jsonl"], ["pairs@a.jsonl", "pairs@a.jsonl"], ["gsm8k@"]]
)
def test_set_names_names_the_key(specs: list[str]) -> None:
    with pytest.raises(InputError, match=r"config\.eval\.tasks\[\d\]"):
        set_names(specs)
