"""Settings that a comparison varies: every combination, with the types of their keys."""

import pytest

from panacea_jax.config import get_config, variations, varied
from panacea_jax.config.variation import written
from panacea_jax.errors import InputError


def test_every_combination_the_last_entry_fastest():
    found = variations(("optimizer.learning_rate=1e-4|1", "train.epochs=1|5"), get_config())
    assert [written(s) for s in found] == [
        "optimizer.learning_rate=0.0001,train.epochs=1", "optimizer.learning_rate=0.0001,train.epochs=5",
        "optimizer.learning_rate=1.0,train.epochs=1", "optimizer.learning_rate=1.0,train.epochs=5",
    ]  # fmt: skip
    assert type(found[2][0][1]) is float
    changed = varied(get_config(), found[1])
    assert (changed.optimizer.learning_rate, changed.train.epochs) == (1e-4, 5)
    assert changed.align.optimizer.learning_rate == get_config().align.optimizer.learning_rate


def test_nothing_varied_is_one_setting():
    assert variations((), get_config()) == [()] and written(()) == ""


def test_texts_may_hold_what_separates():
    spec = "beavertails:only=animal_abuse+self_harm@a.jsonl"
    [(one,), (other,)] = variations((f"data.harmful={spec}|pairs@b.jsonl",), get_config())
    assert (one, other) == (("data.harmful", spec), ("data.harmful", "pairs@b.jsonl"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("train.epochs",), "'train.epochs' is not KEY=VALUE"),
        (("train.epochs=",), "is not KEY=VALUE"),
        (("train.epoch=1",), "'train.epoch=1': no key of data, lora"),
        (("eval.num_examples=1",), "no key of data, lora"),
        (("defence.rho=1",), "no key of data, lora"),
        (("align.train.steps=1",), "no key of data, lora"),
        (("data.poison_ratio=0|1",), "config.compare.ratios"),
        (("train.epochs=1", "train.epochs=2"), "train.epochs is there twice"),
        (("optimizer.learning_rate=1e-4|0.0001",), "a value is there twice"),
        (("train.epochs=many",), "train.epochs=many"),
        (("train.epochs=1.5",), "train.epochs=1.5"),
    ],
)
def test_bad_entries(entries, message):
    with pytest.raises(InputError) as caught:
        variations(entries, get_config())
    assert str(caught.value).startswith("config.compare.vary: ") and message in str(caught.value)
