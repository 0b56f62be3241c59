"""Methods written in a line."""

import pytest

from panacea_jax.defences.spec import Part, Stack, candidates, parse_stack
from panacea_jax.errors import InputError

KEY = "config.compare.methods"


def test_every_part_goes_to_its_stage():
    stack = parse_stack("panacea:lam=0.2,rho=0.25 + vaccine:rho=2+random_perturbation", KEY)
    assert stack == Stack(
        align=Part("vaccine", (("rho", 2),)),
        finetune=Part("panacea", (("rho", 0.25), ("lam", 0.2))),
        heal=Part("random_perturbation"),
    )
    assert str(stack) == "vaccine:rho=2+panacea:rho=0.25,lam=0.2+random_perturbation"
    assert parse_stack(str(stack), KEY) == stack


def test_sft_stands_for_what_is_not_named():
    assert parse_stack("sft", KEY) == Stack() == parse_stack("sft+sft", KEY)
    assert parse_stack("vaccine+sft", KEY) == parse_stack("vaccine", KEY)
    assert str(Stack()) == "sft"


def test_values_are_literals_or_words():
    part = parse_stack("panacea:rho=(0.5,1),lam=1e-3,every=2,final_epsilon=mean", KEY).finetune
    assert part == Part(
        "panacea", (("rho", (0.5, 1)), ("lam", 1e-3), ("every", 2), ("final_epsilon", "mean"))
    )
    assert parse_stack("panacea:rho=1e+1", KEY).finetune == Part("panacea", (("rho", 10.0),))


def test_a_folder_may_be_named_as_comparisons_name_theirs():
    folder = "runs/vaccine_rho=2+panacea_rho=0.25/align/adapter"
    stack = parse_stack(f"resta:base={folder},gamma=2+panacea:rho=1", KEY)
    assert stack.heal == Part("resta", (("base", folder), ("gamma", 2))) and stack.finetune == Part("panacea", (("rho", 1),))


def test_alternatives_multiply():
    found = candidates("vaccine:rho=2|5+panacea:rho=0.1|0.25,lam=0.2", KEY)
    assert [str(stack) for stack in found] == [
        "vaccine:rho=2+panacea:rho=0.1,lam=0.2",
        "vaccine:rho=2+panacea:rho=0.25,lam=0.2",
        "vaccine:rho=5+panacea:rho=0.1,lam=0.2",
        "vaccine:rho=5+panacea:rho=0.25,lam=0.2",
    ]
    assert len(candidates("panacea:rho=1|1|1.0,lam=0.2", KEY)) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("panacae", "'panacae' is no defence; known are sft"),
        ("", "'' is no defence"),
        ("vaccine+panacae", "'panacae' is no defence"),
        ("panacea:mu=1", "panacea has no 'mu'; it has rho, lam"),
        ("sft:rho=1", "sft has no 'rho'; it has none"),
        ("panacea:rho", "'rho' is not KEY=VALUE"),
        ("panacea:", "'' is not KEY=VALUE"),
        ("panacea:rho=1,rho=2", "rho is there twice"),
        ("vaccine+random_vaccine", "vaccine and random_vaccine both act at the stage align"),
        ("panacea:rho=1|2", "belong into config.compare.grid"),
    ],
)
def test_what_is_refused(text, why):
    with pytest.raises(InputError) as error:
        parse_stack(text, KEY)
    assert str(error.value).startswith(f"{KEY}: {text!r}: ") and why in str(error.value)
