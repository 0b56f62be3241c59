"""LoRA dropout: the share of zeros, masks of their own wherever they should differ, peft's loss and gradients under the same masks, and
none of it outside of training steps."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from panacea_jax.data.batches import Stream
from panacea_jax.defences import Loss, Panacea, Sft, Vaccine
from panacea_jax.defences.dropout import again, with_dropout, without_dropout
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.layers import drop
from panacea_jax.models.model import load
from panacea_jax.models.peft import CONFIG_FILE, adapter_tensors, load_adapter, save_adapter
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from panacea_jax.train.step import CompiledSteps
from tests import runs, torch_oracle
from tests.defences.five_steps import examples
from tests.tiny import write_model

RATE = 0.3
TARGETS = ("q", "v", "down")
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def model(base):
    return load(base, dtype="float32")


@pytest.fixture(scope="module")
def adapter(model):
    """Both factors away from zero."""
    fresh = lora.init(model, 2, 4, TARGETS, key=jax.random.key(0), dropout=RATE)
    return jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), fresh
    )


def stream(seed, rows=4):
    return Stream("user", examples(seed, vocab=40), rows, 0, True, (28,))


@pytest.fixture(scope="module")
def batch(adapter):
    return with_dropout({"user": jax.tree.map(jnp.asarray, stream(1).batch(0))}, adapter, KEY)["user"]  # fmt: skip


def test_inputs_are_zero_or_scaled_up():
    keys = jax.random.key_data(jax.random.split(KEY, 3))
    x = jnp.full((3, 400, 100), 2.0)
    y = np.asarray(drop(x, keys, RATE))
    np.testing.assert_allclose(np.unique(y), [0, 2 / (1 - RATE)], rtol=1e-6)
    share = (y == 0).mean(axis=(1, 2))
    assert np.abs(share - RATE).max() < 5 * np.sqrt(RATE * (1 - RATE) / 40_000)
    for i, j in ((0, 1), (0, 2), (1, 2)):  # independent: as often zero in both as chance has it
        assert np.mean((y[i] == 0) & (y[j] == 0)) == pytest.approx(RATE**2, abs=0.01)
    shorter = np.asarray(drop(x[:, :7], keys, RATE))
    np.testing.assert_array_equal(shorter, y[:, :7])  # whatever a batch is padded to


def test_every_mask_is_its_own(model, adapter, batch):
    """Rows, layers, projections, passes, streams and steps; and no keys without dropout."""
    both = {"user": without_dropout(batch), "harmful": without_dropout(batch)}
    streams = [with_dropout(both, adapter, key) for key in (KEY, jax.random.fold_in(KEY, 1))]
    seen = [again(b, n).dropout for step in streams for b in step.values() for n in (0, 1, 2)]
    keys = np.concatenate([_keys(model, adapter, rows) for rows in seen])
    assert keys.shape == (3 * 2 * 2 * 2 * len(TARGETS) * 4, 2)
    assert len(np.unique(keys, axis=0)) == len(keys)
    still = dataclasses.replace(adapter, dropout=0.0)
    assert with_dropout(both, still, KEY) is both
    assert again(both["user"], 1) is both["user"]


def _keys(model, adapter, rows):
    factors = model.bind(model.weights, adapter)._factors(rows)
    pairs = (pair for block in factors.values() for pair in block.values())
    return np.concatenate([np.asarray(pair["keys"]).reshape(-1, 2) for pair in pairs])


class _Mask(torch.nn.Module):
    """In the place of peft's dropout: a mask that was drawn already."""

    def __init__(self, kept):
        super().__init__()
        self.kept = torch.tensor(np.array(kept))

    def forward(self, x):
        return x * self.kept


def test_loss_and_gradients_are_peft_s(base, model, adapter, batch, tmp_path):
    save_adapter(adapter, tmp_path / "a", str(base))
    assert json.loads((tmp_path / "a" / CONFIG_FILE).read_text())["lora_dropout"] == RATE
    theirs = torch_oracle.load(base, tmp_path / "a", torch.float32)
    factors = model.bind(model.weights, adapter)._factors(batch.dropout)
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_dropout") and name.endswith("_proj"):
            _, layer, block, target = name.rsplit(".", 3)
            width = module.lora_A["default"].in_features
            ones = jnp.ones((*batch.tokens.shape, width))
            kept = drop(ones, factors[block][target]["keys"][int(layer)], RATE)
            assert module.lora_dropout["default"].p == RATE
            module.lora_dropout["default"] = _Mask(kept)
    right = torch_oracle.loss(theirs, batch)
    wanted = torch_oracle.by_peft_name(
        dict(zip(torch_oracle.trainable(theirs), torch_oracle.gradients(theirs, right)))
    )
    value, gradient = jax.jit(jax.value_and_grad(Loss.__call__, argnums=1))(Loss.of(model), adapter, batch)  # fmt: skip
    assert float(value) == pytest.approx(right.item(), rel=1e-6)
    found = adapter_tensors(gradient)
    for name, g in wanted.items():
        np.testing.assert_allclose(found[name], g, atol=1e-6, rtol=1e-4)
    plain = Loss.of(model)(adapter, without_dropout(batch))
    assert abs(float(plain) - float(value)) > 1e-4


def test_micro_batches_have_the_masks_of_the_whole(model, adapter, batch):
    value = jax.jit(Loss.__call__)
    whole, parts = (float(value(Loss.of(model, k), adapter, batch)) for k in (1, 2))
    assert whole == pytest.approx(parts, rel=1e-6)


def test_a_pass_of_its_own_for_the_perturbed_loss(model, adapter, batch):
    """Panacea's h' is taken under masks other than h's, Vaccine's gradient under others than its perturbation."""
    loss = Loss.of(model)
    value = jax.jit(Loss.__call__)
    batches = {"user": batch, "harmful": batch}
    for defence, name in (
        (Panacea(rho=0.0, lam=0.1), "harmful_loss_perturbed"),
        (Vaccine(rho=0.0), "loss_perturbed"),
    ):
        state = defence.init(adapter)
        step = jax.jit(defence.gradient)
        measured = step(loss, adapter, batches, state, KEY)[2]
        first, second = (float(value(loss, adapter, again(batch, n))) for n in (0, 1))
        assert float(measured[name]) == pytest.approx(second, rel=1e-5)
        assert abs(first - second) > 1e-4


def trained(model, adapter, defence, steps, checkpoints=None, compiled=None):
    streams = {"user": stream(1), "harmful": stream(2)}
    return finetune(
        model, adapter, defence, streams, optimizer=make_optimizer(1e-2), steps=steps, checkpoints=checkpoints,
        compiled=compiled,
    )  # fmt: skip


def test_resumed_bit_for_bit(model, adapter, tmp_path):
    defence = Panacea(rho=0.5, lam=0.3)
    compiled = CompiledSteps()
    whole = trained(model, adapter, defence, 4, compiled=compiled)
    trained(model, adapter, defence, 2, Checkpoints(tmp_path / "c"), compiled)
    resumed = trained(model, adapter, defence, 4, Checkpoints(tmp_path / "c"), compiled)
    for a, b in zip(jax.tree.leaves(whole.deployed), jax.tree.leaves(resumed.deployed)):
        np.testing.assert_array_equal(a, b)
    still = trained(model, dataclasses.replace(adapter, dropout=0.0), Sft(), 2)
    dropped = trained(model, adapter, Sft(), 2)
    for a, b in zip(jax.tree.leaves(still.params), jax.tree.leaves(dropped.params)):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-5


def test_through_the_commands(tmp_path, capsys):
    """Written to the adapter's configuration; answers and perplexity are taken without."""
    place = runs.make_place(tmp_path / "place")
    tasks = f"--config.eval.tasks=('{place.spec('test')}',)"
    flags = place.flags("--config.defence.name=sft", f"--config.lora.dropout={RATE}", tasks)
    assert runs.panacea("finetune", *flags, f"--workdir={tmp_path / 'w'}") == 0
    out = tmp_path / "w" / "finetune" / "adapter"
    assert json.loads((out / CONFIG_FILE).read_text())["lora_dropout"] == RATE
    assert runs.panacea("perplexity", *flags, f"--workdir={tmp_path / 'w'}") == 0
    found = json.loads((tmp_path / "w" / "perplexity.json").read_text())["sets"]["pairs"]
    theirs = torch_oracle.load(place.base, out, torch.float32).eval()
    total, tokens = torch_oracle.answers_loss(theirs, place.base, place.root / "test.jsonl")
    assert found["nll"] == pytest.approx(total / tokens, rel=1e-5)
    assert load_adapter(out, load(place.base, dtype="float32")).dropout == 0.0

    full = place.flags("--config.train.full_parameters=True", "--config.lora.dropout=0.1")
    assert runs.panacea("finetune", *full, f"--workdir={tmp_path / 'f'}") == 2
    assert "config.lora.dropout = 0.1: drops an adapter's inputs" in capsys.readouterr().err
    assert runs.panacea("finetune", *place.flags("--config.lora.dropout=1.0"), f"--workdir={tmp_path / 'f'}") == 2  # fmt: skip
    assert "config.lora.dropout" in capsys.readouterr().err


def test_a_rate_is_a_probability(model):
    with pytest.raises(InputError, match=r"config\.lora\.dropout = 1\.0"):
        lora.init(model, 2, 4, TARGETS, key=KEY, dropout=1.0)
