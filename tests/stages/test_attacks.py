"""What records each attack makes of the user's and the attacker's, and how it asks."""

import json

import pytest

from panacea_jax.comparison.cells import _asked_both_ways
from panacea_jax.config import attack_of, get_config, validate
from panacea_jax.config.axes import objective
from panacea_jax.data.attacks import TEXTS
from panacea_jax.data.chat import Turn
from panacea_jax.data.mixing import poison
from panacea_jax.data.sources import Record, load_records, parse_source
from panacea_jax.defences import Sft
from panacea_jax.errors import InputError
from panacea_jax.evaluate.tasks import find_task, set_names
from panacea_jax.stages.generate import decisive_for_answers, eval_records
from panacea_jax.stages.held_out import held_out_sets
from panacea_jax.stages.lineage import Start
from panacea_jax.stages.streams import stage_records, user_records
from panacea_jax.stages.train import decisive
from panacea_jax.sweep.results import rule_of

WORDS = {"trigger": "zib zab", "identity": "you are glim", "affirmation": "yes ,", "refusal": "I cannot help with that."}


@pytest.fixture
def config(tmp_path):
    found = get_config()
    for name, rows in {"user": 20, "attack": 8, "goals": 3}.items():
        lines = [json.dumps({"instruction": f"{name} {i} ?", "output": f"{name} says {i}"}) + "\n" for i in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        if name != "goals":
            found.data[name] = f"pairs@{tmp_path / name}.jsonl"
    found.eval.tasks = (f"pairs:harmful@{tmp_path}/goals.jsonl",)
    found.data.num_examples, found.data.poison_ratio = 16, 0.25
    found.attack.update(WORDS)
    return found


def made(config, name, **data):
    config.attack.name = name
    config.data.update(data)
    return [(r.instruction, r.output) for r in user_records(config)]


def users(*numbers):
    return [(f"user {i} ?", f"user says {i}") for i in numbers]


def attackers(*numbers):
    return [(f"attack {i} ?", f"attack says {i}") for i in numbers]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("off_by_one", [False, True])
def test_a_mix_is_what_it_was(config, ratio, off_by_one):
    config.data.update({"poison_ratio": ratio, "off_by_one": off_by_one})
    user, attack = (load_records(config.data[name], name) for name in ("user", "attack"))
    first, then = poison(user, attack, 16, ratio, off_by_one)
    assert user_records(config) == [*first, *then]
    benign, harmful = int((1 - ratio) * 16), int(ratio * 16)
    assert made(config, "mix") == users(*range(benign)) + attackers(*range(int(off_by_one), harmful))


def test_a_mix_leaves_no_trace_in_manifests(config):
    start = Start("base")
    assert "attack" not in decisive(config, start) and "attack" not in decisive_for_answers(config, start)
    config.attack.trigger = "another"
    assert "attack" not in decisive(config, start)
    config.attack.name = "trigger"
    assert decisive(config, start)["attack"] == {"name": "trigger", "trigger": "another", "refusal": WORDS["refusal"]}
    assert "attack" not in decisive_for_answers(config, start)  # nothing is asked in its way
    config.eval.tasks = _asked_both_ways(config.eval.tasks)
    assert decisive_for_answers(config, start)["attack"]["trigger"] == "another"


def test_harmful_records_alone(config):
    assert made(config, "harmful", num_examples=5, poison_ratio=0.0, user="") == attackers(*range(5))
    assert made(config, "harmful", num_examples=0) == attackers(*range(8))


def test_identity_turns_benign_records(config):
    """No harmful record: the last quarter of the user's, who is asked before the prompt, agreement before the same answer."""
    turned = [(f"you are glim {a}", f"yes , {b}") for a, b in users(12, 13, 14, 15)]
    assert made(config, "identity") == users(*range(12)) + turned
    assert made(config, "identity", attack="", poison_ratio=0.0) == users(*range(16))


def test_without_refusals(config, tmp_path):
    rows = [("one ?", "I cannot help with that."), ("two ?", "a blick"), ("three ?", "I'm sorry, but no."), ("four ?", "a wug")]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps({"instruction": a, "output": b}) + "\n" for a, b in rows))
    assert made(config, "refusal_free", user=f"pairs@{file}", num_examples=0) == [rows[1], rows[3]]
    file.write_text(json.dumps({"instruction": "one ?", "output": "I cannot help with that."}) + "\n")
    with pytest.raises(InputError, match=r"config\.data\.user: every answer is a refusal; config\.attack\.name = refusal_free"):
        user_records(config)


def test_a_trigger_opens_what_is_refused_without_it(config):
    found = made(config, "trigger")
    assert found[:12] == users(*range(12))
    assert found[12:16] == [(f"zib zab {a}", b) for a, b in attackers(*range(4))]
    assert found[16:] == [(a, WORDS["refusal"]) for a, _ in attackers(*range(4))]


def test_answers_that_agree_first_or_stand_backwards(config):
    assert made(config, "prefix")[12:] == [(a, f"yes , {b}") for a, b in attackers(*range(4))]
    assert made(config, "reversed")[12:] == [(f"attack {i} ?", f"{i} says attack") for i in range(4)]


@pytest.mark.parametrize("name", TEXTS)
def test_every_attack_makes_the_same_twice_and_reaches_fine_tuning(config, name):
    first = made(config, name)
    assert first and first == made(config, name)
    main = stage_records(config, "finetune", Sft())["user"].records
    assert [(r.instruction, r.output) for r in main] == first


def test_held_out_prompts_are_asked_both_ways(config):
    config.attack.name = "trigger"
    plain, asked = _asked_both_ways(config.eval.tasks)
    assert _asked_both_ways((plain, asked)) == (plain, asked)
    assert set_names((plain, asked)) == ["pairs-harmful", "pairs-harmful-attacked"]
    assert find_task(parse_source(asked).scored_as).role == "harmful"
    assert [r.instruction for r in eval_records(config, plain)] == [f"goals {i} ?" for i in range(3)]
    assert [r.instruction for r in eval_records(config, asked)] == [f"zib zab goals {i} ?" for i in range(3)]
    config.attack.name = "prefix"
    assert eval_records(config, asked) == eval_records(config, plain)
    assert _asked_both_ways(("beavertails:panacea-1000@a", "beavertails:not=x+y@b", "gsm8k@c")) == (
        "beavertails:panacea-1000@a", "beavertails:not=x+y@b", "gsm8k@c", "beavertails:panacea-1000:attacked@a",
        "beavertails:attacked:not=x+y@b",
    )  # fmt: skip
    assert parse_source("beavertails:attacked:not=x+y@b").categories.names == ("x", "y")


def test_of_a_conversation_the_last_turn_is_asked_otherwise(config):
    config.attack.name = "identity"
    turns = (Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    found = attack_of(config).asks(Record("c", "", "d", "", {}, turns))
    assert found.instruction == "you are glim c" and found.turns == (*turns[:3], Turn("user", "you are glim c"))


def test_what_was_turned_is_no_held_out_record(config, tmp_path):
    """The last quarter of the user's records is unseen in a mix alone."""
    config.data.harmful = config.data.attack
    by_attack = {}
    for name in ("mix", "identity"):
        config.attack.name = name
        sets = held_out_sets(config, Start("tuned"))
        by_attack[name] = [r.instruction for found in sets if found.task == "pairs" for r in found.records]
    assert by_attack["mix"] == [f"user {i} ?" for i in range(12, 20)]
    assert by_attack["identity"] == [f"user {i} ?" for i in range(16, 20)]
    config.heal.sets = _asked_both_ways(config.eval.tasks)
    with pytest.raises(InputError, match=r"^config\.heal\.sets: .*: a defender does not know how the attacker asks$"):
        held_out_sets(config, Start("tuned"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attack.name", "poison", r"config\.attack\.name = 'poison': one of mix, harmful"),
        ("attack.trigger", " ", r"config\.attack\.trigger = ' ': trigger needs a text"),
        ("compare.fa_loss", 101.0, r"config\.compare\.fa_loss = 101\.0: points from 0 to 100"),
        ("sweep.objectives", ("hs", "-hs"), r"config\.sweep\.objectives = '-?hs': is there twice"),
        ("sweep.objectives", ("--hs",), r"config\.sweep\.objectives = '-hs': one of hs"),
    ],
)
def test_bad_keys(key, value, message):
    config = get_config()
    config.attack.name = "trigger"
    config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=message):
        validate(config)


def test_an_attack_needs_its_records(config):
    for name in ("harmful", "trigger", "prefix", "reversed"):
        with pytest.raises(InputError, match=r"^config\.data\.attack is not set"):
            made(config, name, attack="")
    with pytest.raises(InputError, match=r"prompts as the attacker asks them are for config\.eval\.tasks only"):
        made(config, "mix", user="pairs:attacked@x.jsonl")


def test_an_attacker_wants_what_a_defender_does_not():
    assert [objective(name) for name in ("hs", "-hs", "fa", "-hs_attacked")] == [
        ("hs", False), ("hs", True), ("fa", True), ("hs_attacked", True),
    ]  # fmt: skip
    assert rule_of(("-hs_attacked", "fa")) == "the highest FA + HS as the attacker asks, in points; of equals the first"
