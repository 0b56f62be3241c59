"""What may be written behind ``--over``."""

import pytest

from panacea_jax.config import get_config, validate
from panacea_jax.config.axes import Span, parse_axes
from panacea_jax.errors import InputError


def axis(entry):
    [found] = parse_axes([entry], get_config())
    return found


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ("defence.rho=0.1,0.5,1", (0.1, 0.5, 1.0)),
        ("config.defence.rho = 2", (2.0,)),
        ("defence.name=sft, panacea", ("sft", "panacea")),
        ("lora.targets=('q','v'),('q',)", (("q", "v"), ("q",))),
        ("data.user='pairs@a,b.jsonl',pairs@c.jsonl", ("pairs@a,b.jsonl", "pairs@c.jsonl")),
        ("data.packing=True,False", (True, False)),
        ("defence.lam=1e-4..1e-2:log3", (1e-4, 1e-3, 1e-2)),
        ("optimizer.clip_norm=0..1:5", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("train.steps=1..100:log3", (1, 10, 100)),
        ("seed=3..5", (3, 4, 5)),
    ],
)
def test_values(entry, values):
    found = axis(entry).points()
    assert found == values and list(map(type, found)) == list(map(type, values))


@pytest.mark.parametrize(
    ("entry", "span"),
    [
        ("optimizer.learning_rate=1e-5..1e-3:log", Span(1e-5, 1e-3, True, False)),
        ("defence.rho=0..2", Span(0.0, 2.0, False, False)),
        ("train.epochs=1..64:log", Span(1.0, 64.0, True, True)),
    ],
)
def test_ranges_to_draw_from(entry, span):
    assert axis(entry).span == span and axis(entry).points() == ()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["defence.rho"], "is not KEY=VALUE,VALUE"),
        (["defence.roh=1"], "did you mean --config.defence.rho"),
        (["defence=sft"], "no key of a single run"),
        (["compare.seeds=1,2"], "no key of a single run"),
        (["seed=1,2", "seed=3"], "seed is there twice"),
        (["seed=1,1"], "a value is there twice"),
        (["train.epochs=0.5,1"], "train.epochs=0.5"),
        (["train.epochs=0.5..3"], "train.epochs=0.5"),
        (["defence.rho=2..1"], "the lower end comes first"),
        (["defence.rho=0..1:log"], "both ends above 0"),
        (["defence.rho=0..1:1"], "two numbers or more"),
        (["model.path=1..3"], "model.path=1"),
    ],
)
def test_what_cannot_be_read_is_named(entries, said):
    with pytest.raises(InputError, match="sweep.over|--config") as error:
        parse_axes(entries, get_config())
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"over": ("defence.rho=0..1",)}, "a grid has to know how many"),
        ({"trials": 5}, "config.sweep.trials = 5"),
        ({"sampler": "tpe"}, "config.sweep.trials = 0"),
        ({"sampler": "cmaes"}, "one of grid, random, tpe, nsga2"),
        ({"objectives": ()}, "name at least one"),
        ({"objectives": ("hs", "speed")}, "one of hs, hs_plus, fa, benign"),
        ({"objectives": ("hs", "hs")}, "is there twice"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(changed, said):
    config = get_config()
    config.sweep.update(changed)
    with pytest.raises(InputError, match="config.sweep") as error:
        validate(config)
    assert said in str(error.value)
