"""VLGuard: the sum of losses, the mixed records, and the limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.config import get_config, make_defence
from panacea_jax.defences import Sft, Vlguard
from panacea_jax.errors import InputError
from panacea_jax.stages.streams import stage_inputs, stage_records
from tests.tiny import write_pairs

KEY = jax.random.key(0)
W = {"x": jnp.asarray([1.0, -2.0, 0.5])}
BATCHES = {"user": jnp.asarray(0.2), "alignment": jnp.asarray(-0.4)}


def loss(w, batch):
    return 0.5 * jnp.sum((w["x"] - batch) ** 2)


def gradient(defence):
    return defence.gradient(loss, W, BATCHES, defence.init(W), KEY)


def test_sum():
    grads, _, metrics = gradient(Vlguard(mode="sum", lam=0.7))
    x = np.asarray(W["x"])
    np.testing.assert_allclose(grads["x"], x - 0.2 + 0.7 * (x + 0.4), rtol=1e-6)
    assert float(metrics["alignment_loss"]) == pytest.approx(0.5 * np.sum((x + 0.4) ** 2))


@pytest.mark.parametrize("defence", [Vlguard(mode="sum", lam=0.0), Vlguard(mode="mix")])
def test_without_lambda_and_on_mixed_batches_the_step_is_sfts(defence):
    np.testing.assert_array_equal(gradient(defence)[0]["x"], gradient(Sft())[0]["x"])


@pytest.fixture
def config(tmp_path):
    config = get_config()
    for seed, (name, rows) in enumerate({"user": 12, "attack": 6, "alignment": 8}.items()):
        config.data[name] = f"pairs@{write_pairs(tmp_path / f'{name}.jsonl', rows, seed)}"
    config.data.num_examples, config.data.num_alignment = 12, 5
    config.data.poison_ratio = 0.25
    config.defence.name = "vlguard"
    return config


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_mix_appends_to_the_poisoned_user_set(config, ratio):
    """The user's own records are those of plain SFT, also without any attack record and without any benign one."""
    config.data.num_examples = 6
    config.data.poison_ratio = ratio
    plain = stage_records(config, "finetune", Sft())
    mixed = stage_records(config, "finetune", Vlguard())
    assert plain.keys() == mixed.keys() == {"user"}
    key, records, size, _ = mixed["user"]
    assert (key, size) == ("config.data.user", 10)
    safe = stage_records(config, "finetune", Vlguard(mode="sum"))["alignment"][1]
    assert len(safe) == 5 and records == plain["user"][1] + safe


def test_without_an_attack_set(config):
    config.data.attack = ""
    assert len(stage_records(config, "finetune", Vlguard())["user"][1]) == 17


def test_the_alignment_source_is_an_input(config):
    for defence in (Vlguard(), Vlguard(mode="sum")):
        assert config.data.alignment in stage_inputs(config, "finetune", defence)
    assert config.data.alignment not in stage_inputs(config, "finetune", Sft())


def test_too_few_alignment_records(config, caplog):
    """All are taken, and it is said."""
    config.data.num_alignment = 0
    everything = stage_records(config, "finetune", Vlguard())["user"].records
    config.data.num_alignment = 900
    assert stage_records(config, "finetune", Vlguard())["user"].records == everything
    assert any(m.startswith("config.data.num_alignment = 900: config.data.alignment holds") for m in caplog.messages)


@pytest.mark.parametrize(("key", "bad"), [("mode", "both"), ("lam", -1.0), ("lam", float("nan"))])
def test_impossible_values_name_the_key(config, key, bad):
    config.defence[key] = bad
    with pytest.raises(InputError, match=f"config.defence.{key}"):
        make_defence(config.defence)
