"""What may stand behind the TASK of an evaluation set: a slice or a role.

A slice says which records of a test set a paper used: ``TASK:SLICE@WHERE`` (methods.md §15).

Figures of different slices are not comparable: Lisa's harmful score is over prompts that are partly
harmless, Vaccine's answers are a quarter as long as Panacea's. So a slice fixes all of it, its name
stands in the names of the files, and ``config.eval.num_examples`` does not apply to it.

A role says what records of a user's own are there for, which their columns cannot:
``TASK:ROLE@WHERE``, like ``pairs:harmful@prompts.jsonl``.

Behind either, or alone, ``attacked`` says that the prompts are asked as the attacker of ``config.attack`` asks them, with his trigger:
``TASK:attacked@WHERE`` (`attacks`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from panacea_jax.errors import InputError


@dataclass(frozen=True)
class Slice:
    """Records ``start`` … ``start + count − 1`` of a set, in file order, and how they are answered.

    Attributes:
        count: Number of records; a shorter set gives what it has. 0: all.
        max_new_tokens: Generation length, in tokens.
        start: First record, counted from 0 and after the filter.
        unsafe_only: Records marked safe (`is_safe`) are dropped first.
        counts: Whether a record does, by its columns that are no prompt; None: all do. The others are dropped first.
    """

    count: int
    max_new_tokens: int
    start: int = 0
    unsafe_only: bool = False
    counts: Callable[[Mapping[str, Any]], bool] | None = None


def _where(column: str, value: str) -> Callable[[Mapping[str, Any]], bool]:
    """Records whose column holds the value, and those of files that do not have the column."""
    return lambda extra: extra.get(column, value) == value


def _contrast(extra: Mapping[str, Any]) -> bool:
    """The unsafe half of XSTest, where ``label`` says so or the ``type`` is a contrast."""
    label = extra.get("label")
    if label is not None:
        return str(label).strip().lower() == "unsafe"
    return str(extra.get("type")).startswith("contrast_")


# panacea-*: Panacea (arXiv 2501.18100) and Booster, and where nothing else is said Antidote and
# Lisa. vaccine-*: Vaccine and T-Vaccine.
SLICES: dict[str, dict[str, Slice]] = {
    "beavertails": {
        "panacea-1000": Slice(1000, 512, unsafe_only=True),
        "vaccine-500": Slice(500, 128, unsafe_only=True),
        "lisa-1000": Slice(1000, 512),  # its script has no filter
    },
    # of whose validation split 872 records are all there are
    "sst2": {"panacea-1000": Slice(1000, 200), "vaccine-500": Slice(500, 200)},
    "ag_news": {"panacea-1000": Slice(1000, 200), "vaccine-500": Slice(500, 200)},
    "gsm8k": {
        "panacea-1000": Slice(1000, 200),
        "vaccine-500": Slice(500, 200),
        "antidote-1000": Slice(1000, 512),
    },
    "alpaca_eval": {"panacea": Slice(104, 256, start=701)},  # index > 700 of 805
    # Harmful prompts of other projects. Of HEx-PHI there are 330 or 300, of SORRY-Bench 450 or 440, by version. HarmBench's copyright
    # behaviours are judged by hashes of the works, which no judge here has. Where no length is published it is HarmBench's 512.
    "harmful": {
        "hex_phi": Slice(0, 512),
        "harmbench": Slice(200, 512, counts=_where("FunctionalCategory", "standard")),
        "harmbench_contextual": Slice(100, 512, counts=_where("FunctionalCategory", "contextual")),
        "sorry_bench": Slice(0, 1024, counts=_where("prompt_style", "base")),
        "strongreject": Slice(313, 512),
        "jailbreakbench": Slice(100, 150),
        "or_bench_toxic": Slice(655, 512),
        "xstest_unsafe": Slice(200, 256, counts=_contrast),
    },
}


# What a set of a user's own measures: whether harmful prompts are answered, whether benign ones
# are refused, or whether the answers are right.
ROLES = ("harmful", "benign", "task")
TASKS_WITH_ROLES = ("pairs", "chat")
ATTACKED = ":attacked"


def is_role(task: str, name: str) -> bool:
    """Whether what stands behind the colon is a role of the task."""
    return task in TASKS_WITH_ROLES and name in ROLES


def find_slice(task: str, name: str) -> Slice | None:
    """The slice of that name; None for the empty name.

    Raises:
        InputError: The task has no such slice; lists those (or the roles) that it has.
    """
    if not name:
        return None
    if task in TASKS_WITH_ROLES:
        raise InputError(f"unknown role {name!r} of {task}; known: {' '.join(ROLES)}")
    known = SLICES.get(task, {})
    if name not in known:
        has = f"known: {' '.join(known)}" if known else f"{task} has none"
        raise InputError(f"unknown slice {name!r} of {task}; {has}")
    return known[name]
