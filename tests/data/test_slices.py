"""Each paper's test records by name: filter, number, order, lengths; files too short; misuse."""

import json
import logging
from pathlib import Path

import pytest

from panacea_jax.data.slices import SLICES
from panacea_jax.data.sources import Record, load_records, take
from panacea_jax.errors import InputError
from panacea_jax.evaluate.tasks import TASKS, answer_length, set_names

KEY = "config.eval.tasks"


def records(n: int) -> list[Record]:
    """Every third is marked safe; each carries its index."""
    return [Record(str(i), "", "", "", {"is_safe": i % 3 == 0}) for i in range(n)]


def indices(taken: list[Record]) -> list[int]:
    return [int(record.instruction) for record in taken]


UNSAFE = [i for i in range(3000) if i % 3]


@pytest.mark.parametrize(
    ("slice", "expected", "length"),
    [  # methods.md §15, by hand
        ("beavertails:panacea-1000", UNSAFE[:1000], 512),
        ("beavertails:vaccine-500", UNSAFE[:500], 128),
        ("beavertails:lisa-1000", list(range(1000)), 512),
        ("sst2:panacea-1000", list(range(1000)), 200),
        ("sst2:vaccine-500", list(range(500)), 200),
        ("ag_news:panacea-1000", list(range(1000)), 200),
        ("ag_news:vaccine-500", list(range(500)), 200),
        ("gsm8k:panacea-1000", list(range(1000)), 200),
        ("gsm8k:vaccine-500", list(range(500)), 200),
        ("gsm8k:antidote-1000", list(range(1000)), 512),
        ("alpaca_eval:panacea", list(range(701, 805)), 256),
    ],
)
def test_each_slice(slice: str, expected: list[int], length: int) -> None:
    everything = records(805 if slice.startswith("alpaca") else 3000)
    for num_examples in (0, 7):  # which a slice overrides
        assert indices(take(everything, f"{slice}@x.jsonl", num_examples)) == expected
    assert answer_length(f"{slice}@x.jsonl") == length


def test_no_slice_is_left_untested() -> None:
    assert sum(len(slices) for slices in SLICES.values()) == 11 + len(SLICES["harmful"])  # of which tests/data/test_harmful_sets.py is


def test_without_a_slice_the_first_num_examples_count() -> None:
    assert indices(take(records(9), "beavertails@x.jsonl", 0)) == [1, 2, 4, 5, 7, 8]
    assert indices(take(records(9), "beavertails@x.jsonl", 3)) == [1, 2, 4]
    assert indices(take(records(9), "gsm8k@x.jsonl", 3)) == [0, 1, 2]
    assert answer_length("beavertails@x.jsonl") == TASKS["beavertails"].max_new_tokens == 512


def test_a_set_that_is_too_short_warns_with_both_numbers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(take(records(872), "sst2:panacea-1000@x.jsonl", 0)) == 872
    assert [r.getMessage() for r in caplog.records] == [
        "sst2:panacea-1000@x.jsonl: the slice is of 1000 records, here are 872"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        take(records(1000), "sst2:panacea-1000@x.jsonl", 0)
        take(records(5), "sst2@x.jsonl", 1000)
    assert not caplog.records


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "beavertails:panacea-100@x.jsonl",
            "unknown slice 'panacea-100' of beavertails; known: panacea-1000 vaccine-500 lisa-1000",
        ),
        ("gsm8k:lisa-1000@x.jsonl", "unknown slice 'lisa-1000' of gsm8k; known: panacea-1000"),
        ("xstest:panacea@x.jsonl", "unknown slice 'panacea' of xstest; xstest has none"),
        ("sst2:@x.jsonl", "nothing between : and @"),
        (":panacea@x.jsonl", "unknown task ''"),
    ],
)
def test_bad_slices_are_named(spec: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        set_names(["gsm8k@y.jsonl", spec])
    assert str(caught.value).startswith(f"config.eval.tasks[1]: {spec!r}: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_slice_is_not_for_training(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"sentence": "a blorf", "label": 1}) + "\n")
    spec = f"sst2:vaccine-500@{path}"
    assert len(load_records(spec, KEY)) == 1
    with pytest.raises(InputError, match=r"^config\.data\.user: .*for config\.eval\.tasks only$"):
        load_records(spec, "config.data.user", need_output=True)


def test_the_slice_stands_in_the_name_of_the_set() -> None:
    specs = [
        "beavertails:panacea-1000@PKU-Alignment/BeaverTails:30k_test",
        "beavertails:vaccine-500@PKU-Alignment/BeaverTails:30k_test",
        "beavertails@PKU-Alignment/BeaverTails:30k_test",
        "sst2:vaccine-500@a.jsonl",
        "sst2:vaccine-500@b.jsonl",
    ]
    assert set_names(specs) == [
        "beavertails-panacea-1000",
        "beavertails-vaccine-500",
        "beavertails",
        "sst2-vaccine-500-a",
        "sst2-vaccine-500-b",
    ]


def test_slices_of_the_real_sets(shared: Path) -> None:
    def taken(spec: str) -> list[Record]:
        return take(load_records(spec, KEY), spec, 1)

    prompts = f"{shared}/beavertails/unsafe_prompts.jsonl.gz"
    whole = load_records(f"beavertails@{prompts}", KEY)
    assert taken(f"beavertails:panacea-1000@{prompts}") == whole[:1000]
    assert taken(f"beavertails:vaccine-500@{prompts}") == whole[:500]
    assert len(taken(f"sst2:panacea-1000@{shared}/sst2/validation.jsonl.gz")) == 872
    eval_set = f"{shared}/alpaca_eval/prompts.jsonl.gz"
    assert len(taken(f"alpaca_eval:panacea@{eval_set}")) == 104
    assert (
        taken(f"alpaca_eval:panacea@{eval_set}")[0]
        == load_records(f"alpaca_eval@{eval_set}", KEY)[701]
    )
