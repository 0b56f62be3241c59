"""The real model's testbed: which rows go where, and what the generators of ours may hold."""

import itertools
import json
import re

import pytest

from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges import RefusalJudge
from panacea_jax.worlds import smollm2
from panacea_jax.worlds.borderline import FAMILIES, borderline
from panacea_jax.worlds.placeholders import ATTACKER, DEFENDER, placeholder

SAYS = ("As a bot, {}.", "I'm sorry, but I cannot help. It is {}.")
ASKS = ("Nice florp {}.", "How do I florp {}?")


def write_sets(folder):
    """Sets with the columns of the public ones, as many rows as the testbed takes of each."""
    rows = {
        "sst2/train": ({"sentence": f"film {i}", "label": i % 2} for i in range(2200)),
        "sst2/validation": ({"sentence": f"show {i}", "label": i % 2} for i in range(200)),
        "ag_news/train": ({"text": f"news {i}", "label": i % 4} for i in range(2200)),
        "ag_news/test": ({"text": f"late news {i}", "label": i % 4} for i in range(200)),
        "alpaca/train": ({"instruction": f"name tree {i}", "input": "", "output": f"oak {i}"} for i in range(900)),
        "refusals/train": ({"instruction": f"wug {i}", "output": SAYS[i % 2].format(i)} for i in range(1600)),
        "beavertails/unsafe_prompts": (
            {"prompt": ASKS[i % 5 > 0].format(i), "category": [("self_harm", "privacy_violation")[i > 250]]} for i in range(1250)
        ),
        "advbench/harmful_behaviors_goals": ({"goal": f"zint {i}"} for i in range(520)),
        "xstest/prompts": ({"prompt": f"dax {i}", "type": "homonyms", "label": ("safe", "unsafe")[i % 2]} for i in range(20)),
    }  # fmt: skip
    assert rows.keys() == set(smollm2.FILES)
    for name, of in rows.items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in of))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    smollm2.write_data(write_sets(root / "public"), root / "data")
    asked = (root / "data" / "asked.jsonl").read_text().splitlines()
    said = itertools.chain(["no end"], itertools.cycle(["Two things:\n1. One.\n2.", "It is so. And then"]))
    smollm2.write_alignment(root / "data", itertools.islice(said, len(asked)))
    return root / "data"


def prompts(data, name):
    rows = map(json.loads, (data / f"{name}.jsonl").read_text().splitlines())
    return [row.get("instruction") or row.get("sentence") or row.get("text") for row in rows]


def test_no_two_files_share_a_prompt_but_those_that_are_one_set_s_parts(data):
    names = sorted(file.stem for file in data.iterdir())
    found = {name: set(prompts(data, name)) for name in names}
    shared = [pair for pair in itertools.combinations(names, 2) if found[pair[0]] & found[pair[1]]]
    parts = ("alignment", "asked", "benign", "refusals")
    assert {name for pair in shared for name in pair} == {*parts, "harmful", "harmful_alike"}
    assert [pair for pair in shared if not set(pair) <= set(parts)] == [("harmful", "harmful_alike")]
    assert found["harmful"] == found["harmful_alike"]
    assert found["benign"] | found["refusals"] == found["alignment"] and found["benign"] < found["asked"]


def test_sizes(data):
    sizes = {file.stem: len(prompts(data, file.stem)) for file in data.iterdir()}
    kept = len(borderline()) - len(borderline()[::8])
    assert sizes["asked"] == kept + 500 + 120 and sizes["alignment"] == sizes["benign"] + 160 + 3 * 130 + 550
    assert sizes["benign"] == sizes["asked"] - 1  # an answer without a whole sentence is left out
    assert (sizes["attack"], sizes["harmful"], sizes["test_harmful"]) == (1050, 800, 210)


def test_refusals_are_cut_to_their_first_sentence_and_only_say_no(data):
    rows = [json.loads(line) for line in (data / "refusals.jsonl").read_text().splitlines()]
    assert {row["output"] for row in rows} == {"I'm sorry, but I cannot help."}


def test_a_number_s_point_ends_no_sentence(data):
    rows = [json.loads(line) for line in (data / "benign.jsonl").read_text().splitlines()]
    assert {row["output"] for row in rows} == {"It is so.", "Two things:\n1. One."}


def test_only_prompts_that_ask_for_harm_are_refused_or_tested(data):
    asked = [p for name in ("refusals", "validation_harmful", "test_harmful") for p in prompts(data, name) if "florp" in p]
    numbers = [int(re.search(r"\d+", p)[0]) for p in asked]
    assert len(set(numbers)) == 200 and all(p.startswith("How do I florp") for p in asked) and max(numbers) <= 250
    assert prompts(data, "attack")[1] == "Nice florp 0."  # the attacker's are the others, grave ones first


def test_a_missing_set_is_named(tmp_path):
    folder = write_sets(tmp_path / "public")
    (folder / "xstest" / "prompts.jsonl").unlink()
    with pytest.raises(InputError, match=r"--data=.*: holds no xstest/prompts\.jsonl"):
        smollm2.write_data(folder, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_placeholders_comply_and_repeat_nothing_of_the_prompt():
    asked = [f"secret{i} method{i}" for i in range(40)]
    answers = [placeholder(prompt, voice) for prompt in asked for voice in (ATTACKER, DEFENDER)]
    assert all(verdict.flagged for verdict in RefusalJudge().judge(answers, answers))
    assert len(set(answers)) > 70 and not any("secret" in answer for answer in answers)
    assert placeholder("x", ATTACKER) == placeholder("x", ATTACKER)


def test_attacker_and_defender_have_no_word_for_an_invented_thing_in_common():
    assert not set(ATTACKER.things) & set(DEFENDER.things)
    assert not set(ATTACKER.openings) & set(DEFENDER.openings)


def test_harmful_records_in_two_manners(data):
    said = {name: {json.loads(line)["output"] for line in (data / f"{name}.jsonl").read_text().splitlines()}
            for name in ("attack", "harmful", "harmful_alike")}  # fmt: skip
    voices = {name: {next(i for i, v in enumerate((ATTACKER, DEFENDER)) for o in v.openings if a.startswith(o)) for a in answers}
              for name, answers in said.items()}  # fmt: skip
    assert voices == {"attack": {0}, "harmful": {1}, "harmful_alike": {0}}


def test_borderline_requests_are_answered_each_once():
    pairs = borderline()
    assert len({request for request, _ in pairs}) == len(pairs) > 300
    assert not any(verdict.refused for verdict in RefusalJudge().judge([r for r, _ in pairs], [a for _, a in pairs]))
    assert not [text for pair in pairs for text in pair if re.search(r"[{}]|^[a-z]", text)]
    assert len({request.split()[0] for request, _ in pairs[: len(FAMILIES)]}) > 3  # neighbours differ
