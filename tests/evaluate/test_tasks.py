"""The table of tasks and the names of sets; the scoring rules are in test_rules.py."""

import pytest

from panacea_jax.data.columns import READERS
from panacea_jax.errors import InputError
from panacea_jax.evaluate.tasks import TASKS, set_names


def test_every_source_task_has_an_entry_and_published_lengths() -> None:
    assert set(TASKS) == set(READERS)
    published = {"beavertails": 512, "sst2": 200, "ag_news": 200, "gsm8k": 200, "alpaca_eval": 256}
    assert {name: TASKS[name].max_new_tokens for name in published} == published
    roles = {
        role: {name for name in TASKS if TASKS[name].role == role}
        for role in {t.role for t in TASKS.values()}
    }
    assert roles == {
        "harmful": {"beavertails", "advbench", "harmful"},
        "over_refusal": {"xstest", "or_bench"},
        "accuracy": {"gsm8k", "sst2", "ag_news", "pairs", "chat"},
        "generation": {"alpaca", "alpaca_eval", "refusals"},
    }


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
