"""What each task's columns mean, on invented rows; errors name the field."""

import pytest

from panacea_jax.data.columns import READERS, read_columns
from panacea_jax.errors import InputError


def parts(task: str, **row: object) -> tuple[str, str, str, str]:
    fields = read_columns(task, row, need_output=False)
    return fields.instruction, fields.input, fields.output, fields.reference


def test_every_task_of_the_contract_is_known():
    tasks = "gsm8k sst2 ag_news alpaca alpaca_eval beavertails refusals xstest advbench harmful or_bench chat pairs"
    assert list(READERS) == tasks.split()


def test_gsm8k_ending_leaves_two_spaces_and_the_reference_has_no_commas():
    answer = "2 blorfs and 3\nmake 5.\n#### 1,205"
    assert parts("gsm8k", question="How many?", answer=answer) == (
        "How many?",
        "",
        "2 blorfs and 3\nmake 5.\nThe final answer is:  1,205",
        "1205",
    )


@pytest.mark.parametrize(
    ("task", "label", "name"),
    [
        ("sst2", 0, "negative"),
        ("sst2", 1, "positive"),
        ("sst2", "1", "positive"),
        ("sst2", "negative", "negative"),
        ("ag_news", 0, "World"),
        ("ag_news", 1, "Sports"),
        ("ag_news", "2", "Business"),
        ("ag_news", 3, "Sci/Tech"),
    ],
)
def test_labels_become_names(task: str, label: object, name: str):
    assert parts(task, sentence="a blorf", text="a blorf", label=label)[1:] == (
        "a blorf",
        name,
        name,
    )


@pytest.mark.parametrize("label", [-1, 2, "2", "good", 0.0, True, [], "-1"])
def test_other_labels_are_refused(label: object):
    with pytest.raises(InputError, match=r"'label' is .*known: 0 negative, 1 positive"):
        parts("sst2", sentence="a blorf", label=label)


@pytest.mark.parametrize("task", ["alpaca", "pairs", "refusals"])
def test_input_is_optional(task: str):
    row = {"instruction": "mend", "output": "vix"}
    for given in ({}, {"input": None}, {"input": ""}):
        assert parts(task, **row, **given) == ("mend", "", "vix", "vix")
    assert parts(task, **row, input="a blorf") == ("mend", "a blorf", "vix", "vix")


def test_paired_refusal_file():
    row = {"prompt": "mend it", "response": "vix", "refusal": "Question: mend it\nAnswer: No."}
    assert parts("refusals", **row) == ("mend it", "", "No.", "No.")
    assert parts("beavertails", **row) == ("mend it", "", "vix", "")
    with pytest.raises(InputError, match="'refusal' is not of the form"):
        parts("refusals", prompt="mend it", refusal="No.")


def test_alpaca_eval_answer_under_either_name():
    assert parts("alpaca_eval", instruction="mend", output="vix")[2:] == ("vix", "vix")
    assert parts("alpaca_eval", instruction="mend", reference_output="vix")[2:] == ("vix", "vix")


ROWS = {
    "gsm8k": {"question": "q", "answer": "#### 1"},
    "sst2": {"sentence": "s", "label": 0},
    "ag_news": {"text": "t", "label": 0},
    "alpaca": {"instruction": "i", "output": "o"},
    "alpaca_eval": {"instruction": "i", "output": "o"},
    "beavertails": {"prompt": "p"},
    "refusals": {"instruction": "i", "output": "o"},
    "xstest": {"prompt": "p"},
    "advbench": {"goal": "g"},
    "harmful": {"prompt": "p"},
    "or_bench": {"prompt": "p"},
    "pairs": {"instruction": "i", "output": "o"},
}


@pytest.mark.parametrize(("task", "name"), [(t, name) for t, row in ROWS.items() for name in row])
def test_each_needed_field(task: str, name: str):
    parts(task, **ROWS[task])
    rest = {other: value for other, value in ROWS[task].items() if other != name}
    with pytest.raises(InputError, match=f"no field '{name}'"):
        parts(task, **rest)
    empty = "no field 'label'" if name == "label" else f"field '{name}' must be text, not null"
    with pytest.raises(InputError, match=empty):
        parts(task, **rest, **{name: None})
    if name != "label":
        with pytest.raises(InputError, match=f"'{name}' must be text, not int"):
            parts(task, **rest, **{name: 7})
        with pytest.raises(InputError, match=f"'{name}' is not valid Unicode"):
            parts(task, **rest, **{name: "\ud800"})


@pytest.mark.parametrize("answer", ["5", "####", "#### \n"])
def test_gsm8k_needs_its_number(answer: str):
    with pytest.raises(InputError, match="'answer' does not end in '#### NUMBER'"):
        parts("gsm8k", question="q", answer=answer)
