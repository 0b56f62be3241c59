"""Ascent on finished weights: closed forms on a quadratic, and projected steps as PyTorch makes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from panacea_jax.config import get_config, make_defence
from panacea_jax.data.batches import Batch, Stream
from panacea_jax.defences import Ascent, Loss, Panacea
from panacea_jax.defences.ascent import STRIDE
from panacea_jax.defences.protocol import single_batches_of, whole_passes_of
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.models.peft import adapter_tensors, save_adapter
from panacea_jax.train.once import apply_once
from tests import torch_oracle as oracle
from tests.defences.test_ascent import assert_equal, model, start, streams
from tests.families import build, save
from tests.train.test_loop import examples

__all__ = ["model"]  # a fixture

RHO = 0.5
KEEP = ("user", "benign")
DIM = 6


# ---- a quadratic: ½‖w − c‖², c the mean of a set's rows of tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bowl(Loss):
    def summed(self, params, batch):
        rows = batch.tokens.astype(jnp.float32)
        return 0.5 * jnp.sum((params["w"] - rows) ** 2), jnp.asarray(float(len(rows)))

    def __call__(self, params, batch, offsets=None):
        total, count = self.summed(params, batch)
        return total / count


def rows(*centres):
    tokens = np.asarray(centres, np.int32)
    everywhere = np.ones(tokens.shape, np.bool_)
    return Batch(jnp.asarray(tokens), jnp.asarray(everywhere), jnp.asarray(everywhere))


W = {"w": jnp.asarray(np.random.default_rng(0).normal(size=DIM), jnp.float32)}
HARMFUL = [rows([2] * DIM, [4, 0, 1, 1, 1, 3]), rows([1, 2, 3, 4, 5, 6])]
USER = [rows([5, 0, 0, 1, 0, 0])]
BENIGN = [rows([0, 3, 0, 0, 2, 0])]
SETS = {"harmful": HARMFUL, "user": USER, "benign": BENIGN}


def centre(batches):
    return np.concatenate([np.asarray(b.tokens) for b in batches]).mean(0)


def climbed(model, method):
    loss = Bowl.of(model)
    return np.asarray(method.first_pass(loss, W, SETS, method.init(W)).epsilon["w"])


def value(epsilon, batches):
    return float(np.mean([0.5 * np.sum((W["w"] + epsilon - row) ** 2) for b in batches for row in np.asarray(b.tokens)]))


def test_one_step_is_the_closed_form(model):
    """On a sphere around w the bowl is highest straight away from its centre."""
    away = np.asarray(W["w"]) - centre(HARMFUL)
    found = climbed(model, Ascent(rho=RHO))
    np.testing.assert_allclose(found, RHO * away / np.linalg.norm(away), rtol=1e-5)


@pytest.mark.parametrize("keep", [("user",), ("user", "benign")])
def test_one_step_off_the_sets_that_are_kept(model, keep):
    found = climbed(model, Ascent(rho=RHO, keep=keep))
    assert np.linalg.norm(found) == pytest.approx(RHO, rel=1e-5)
    for name in keep:
        gradient = np.asarray(W["w"]) - centre(SETS[name])
        assert abs(found @ gradient) < 1e-5 * np.linalg.norm(gradient)


def test_many_steps_find_the_top_of_the_ball(model):
    """One harmful batch, so that every step climbs the same bowl; its highest point in the ball is known."""
    method, loss = Ascent(rho=RHO, steps=12), Bowl.of(model)
    state = method.first_pass(loss, W, {"harmful": HARMFUL[1:]}, method.init(W))
    away = np.asarray(W["w"]) - centre(HARMFUL[1:])
    np.testing.assert_allclose(state.epsilon["w"], RHO * away / np.linalg.norm(away), atol=1e-5)


def test_a_price_holds_the_loss_that_is_kept(model):
    """Unpriced, the ascent raises the user's loss far more than the slack; priced, by about the slack, and still climbs."""
    slack, steps = 0.1, 60
    free = climbed(model, Ascent(rho=RHO, steps=steps))
    held = climbed(model, Ascent(rho=RHO, steps=steps, keep=("user",), constraint="lagrangian", slack=slack))
    rise = {name: value(e, USER) - value(0, USER) for name, e in (("free", free), ("held", held))}
    assert rise["free"] > 5 * slack
    assert rise["held"] < 2 * slack
    assert np.linalg.norm(held) <= RHO * (1 + 1e-6)
    assert value(held, HARMFUL) > value(0, HARMFUL)


def test_a_price_is_paid_only_where_the_slack_is_used_up(model):
    method = Ascent(rho=RHO, steps=10, keep=("user",), constraint="lagrangian", slack=100)
    np.testing.assert_array_equal(climbed(model, method), climbed(model, Ascent(rho=RHO, steps=10)))


# ---- a decoder


def test_one_step_is_panaceas_last_word(model):
    """The ε of ``final_epsilon="mean"`` at the same w, to the bit."""
    bare, w = start(model, False)
    sets = {"harmful": [jax.tree.map(jnp.asarray, b) for b in streams()["harmful"].once()]}
    panacea = Panacea(rho=RHO, final_epsilon="mean")
    theirs = panacea.last_pass(Loss.of(bare), w, sets, panacea.init(w)).epsilon
    result = apply_once(bare, w, Ascent(rho=RHO), streams())
    assert_equal(result.epsilon, theirs)
    assert_equal(result.deployed, jax.tree.map(jnp.add, w, theirs))


@pytest.mark.parametrize("constraint", ["project", "lagrangian"])
def test_steps_equal_pytorch(constraint, tmp_path):
    """Gradients by PyTorch through transformers and peft; least squares, prices and the ball in NumPy."""
    steps, slack, rate = 4, 0.0, 20.0
    seeds = {"project": (0, 1, 2), "lagrangian": (0, 0, 2)}[constraint]  # 0 twice: a loss that the ascent is sure to raise
    base = save(build("llama2", num_hidden_layers=2), tmp_path / "base")
    model = load(base, dtype="float32")
    adapter = lora.init(model, 4, 8, ("q", "v"), key=jax.random.key(0))
    layers = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), adapter.layers
    )
    adapter = lora.Adapter(layers, adapter.rank, adapter.alpha)
    save_adapter(adapter, tmp_path / "adapter", str(base))
    found = {name: Stream(name, examples(i, 7), 4, 0, False, (16,)) for i, name in zip(seeds, ("harmful", *KEEP))}
    method = Ascent(rho=RHO, steps=steps, keep=KEEP, constraint=constraint, slack=slack, dual_rate=rate)
    state = apply_once(model, adapter, method, found).state

    theirs = oracle.load(base, tmp_path / "adapter", torch.float32)
    params = oracle.trainable(theirs)
    w = [p.detach().clone() for p in params.values()]
    epsilon, prices = [torch.zeros_like(p) for p in w], np.zeros(2)
    batches = {name: list(stream.once()) for name, stream in found.items()}

    def look(name, step, at):
        with torch.no_grad():
            for p, k, e in zip(params.values(), w, at):
                p.copy_(k + e)
        loss = oracle.loss(theirs, batches[name][step % 2])
        return loss.item(), np.concatenate([g.numpy().ravel() for g in oracle.gradients(theirs, loss)]).astype(np.float64)

    for step in range(steps):
        _, d = look("harmful", step, epsilon)
        kept = [look(name, step, epsilon) for name in method.keep]
        if constraint == "project":
            matrix = np.stack([g for _, g in kept], axis=1)
            d = d - matrix @ np.linalg.lstsq(matrix, d)[0]
        else:
            d = d - sum(price * g for price, (_, g) in zip(prices, kept))
            excess = [v - look(n, step, [torch.zeros_like(e) for e in epsilon])[0] - slack for n, (v, _) in zip(method.keep, kept)]
            prices = np.maximum(0, prices + rate * np.asarray(excess))
        flat = np.concatenate([e.numpy().ravel() for e in epsilon]) + STRIDE * RHO / steps * d / np.linalg.norm(d)
        flat *= min(1.0, RHO / np.linalg.norm(flat))
        cuts = np.split(flat, np.cumsum([e.numel() for e in epsilon])[:-1])
        epsilon = [torch.tensor(c.reshape(e.shape), dtype=torch.float32) for c, e in zip(cuts, epsilon)]

    with torch.no_grad():
        for p, e in zip(params.values(), epsilon):
            p.copy_(e)
    want, ours = oracle.by_peft_name(params), adapter_tensors(state.epsilon)
    worst = max(np.linalg.norm(ours[n] - x) / np.linalg.norm(x) for n, x in want.items())
    print(f"ascent {constraint}: {worst:.1e}, prices {prices}")
    assert worst < 1e-4
    assert float(optax.tree.norm(state.epsilon)) <= RHO * (1 + 1e-6)
    if constraint == "lagrangian":
        assert prices.max() > 0
        np.testing.assert_allclose(state.multipliers, prices, atol=1e-3 * prices.max())


def test_what_it_costs():
    assert whole_passes_of(Ascent(rho=1, keep=("user",))) == {"harmful": 1.0, "user": 1.0}
    assert single_batches_of(Ascent(rho=1, keep=("user",))) == {}
    priced = Ascent(rho=1, steps=8, keep=("benign",), constraint="lagrangian")
    assert single_batches_of(priced) == {"harmful": 8.0, "benign": 12.0}
    assert whole_passes_of(priced) == {}


@pytest.mark.parametrize(
    ("key", "bad"),
    [("rho", -1.0), ("rho", "car"), ("steps", 0), ("keep", ("harmful",)), ("keep", ("user", "user")), ("slack", -0.1),
     ("constraint", "lagrangian"), ("constraint", "prey")],
)  # fmt: skip
def test_impossible_values(key, bad):
    section = get_config().heal.defence
    section.name = "ascent"
    section[key] = bad
    with pytest.raises(InputError, match=rf"config\.heal\.defence\.{key} = "):
        make_defence(section, "heal.")


def test_auto_is_chosen_elsewhere(model):
    bare, w = start(model, False)
    with pytest.raises(InputError, match=r"rho = 'auto'.*panacea heal"):
        apply_once(bare, w, Ascent(), streams())
