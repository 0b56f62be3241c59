"""Packed = unpacked: losses and gradients of every architecture and every method, whole runs, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.data.batches import Stream, pack, pad
from panacea_jax.data.encode import Example
from panacea_jax.defences import (
    DEFENCES,
    Bds,
    Booster,
    BoosterVaccine,
    ConstrainedSft,
    Defence,
    Ewc,
    Kl,
    Ldifs,
    Lisa,
    Loss,
    Panacea,
    RandomVaccine,
    RepNoise,
    SafeGrad,
    Sbr,
    Sft,
    Tar,
    Triplet,
    TVaccine,
    Vaccine,
    Vlguard,
)
from panacea_jax.defences.protocol import check_packing
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.inputs import segment_positions
from panacea_jax.models.model import load
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests.families import FAMILIES, VOCAB, build, save
from tests.tiny import write_model
from tests.train.test_loop import assert_equal

# Each is longer than the windows of the families, which are 5 tokens wide.
SIZES = (17, 12, 8, 23, 7)
ROWS = [[3, 0], [1, 2, 4]]

METHODS = [
    Sft(),
    Panacea(rho=0.5, lam=0.3),
    Panacea(rho=0.5, lam=0.3, every=2, final_epsilon="mean"),
    Vaccine(rho=0.5),
    TVaccine(rho=0.5, layers=1, interval=2, importance_interval=2),
    Booster(lam=1.0, alpha=0.3),
    BoosterVaccine(lam=1.0, alpha=0.3, rho=0.5),
    Tar(inner_steps=2, inner_every=1, inner_learning_rate=1e-3),
    Lisa(rho=0.5, alignment_steps=1, finetune_steps=2, warmup_steps=1),
    Ldifs(rho=1e-3, gate=float("inf")),
    Ldifs(rho=1.0, gate=0),
    Ewc(lam=10.0),
    Kl(lam=1.0),
    Vlguard(mode="sum", lam=0.5),
    Sbr(lam=5.0, prompts=3),
    ConstrainedSft(beta=2.0),
    Triplet(alpha=0.05, refusal=0.5),
    SafeGrad(rho=2.0),
    Bds(logit_rate=0.1),
]


def texts(vocab=VOCAB, sizes=SIZES):
    rng = np.random.default_rng(0)
    # One record without a prompt: its first token has nothing to be predicted from.
    return [
        Example.answering(rng.integers(0, vocab, n).astype(np.int32), prompt)
        for n, prompt in zip(sizes, (3, 5, 0, 6, 2))
    ]


def mean_loss(trained, model, batch):
    base, adapter = trained
    return Loss(dataclasses.replace(model, weights=None), base)(adapter, batch)


def difference(a, b):
    """Largest difference of two trees, relative to the largest entry of the second."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert pairs
    largest = max(float(jnp.abs(y).max()) for _, y in pairs)
    return max(float(jnp.abs(x - y).max()) for x, y in pairs) / largest


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_unpacked_rows(family, tmp_path):
    """By all weights and by an adapter; 40 positions are more than one chunk of the cross-entropy."""
    model = load(save(build(family), tmp_path / family), dtype="float32")
    examples = texts()
    plain = jax.tree.map(jnp.asarray, pad(examples, 24, 5))
    packed = pack([[examples[i] for i in row] for row in ROWS], 40, 3)
    packed = jax.tree.map(jnp.asarray, packed)
    adapter = lora.init(model, 2, 4, ("q", "v", "down"), key=jax.random.key(0))
    # B is 0 in a fresh adapter, and then A has no gradient.
    adapter = jax.tree.map(lambda x: x + 0.02, adapter)
    gradient = jax.jit(jax.value_and_grad(lambda trained, b: mean_loss(trained, model, b)))
    expected, (by_weights, by_adapter) = gradient((model.weights, adapter), plain)
    value, found = gradient((model.weights, adapter), packed)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert difference(found[0], by_weights) < 1e-5
    assert difference(found[1], by_adapter) < 1e-5
    # The same rows with the segments dropped are another thing.
    dropped = mean_loss((model.weights, adapter), model, packed._replace(segments=None))
    assert abs(float(dropped) - float(expected)) > 1e-3


def test_positions_begin_anew():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0] * 8])
    found = segment_positions(segments)
    assert found.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], list(range(8)), list(range(8))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("tiny") / "base"), dtype="float32")


def streams(packing, defence=None):
    repeats = {name: spec.repeats for name, spec in defence.streams.items()}

    def stream(name, seed):
        rng = np.random.default_rng(seed)
        examples = [
            Example.answering(rng.integers(0, 40, k).astype(np.int32), 2) for k in rng.integers(4, 10, 21)
        ]
        return Stream(
            name, examples, 6, 0, True, (32,), fixed_length=name != "user",
            repeats=repeats.get(name, 1), packing=packing,
        )  # fmt: skip

    return {name: stream(name, i) for i, name in enumerate(("user", "harmful", "alignment", "benign"))}


def run(model, defence, packing, full=False, steps=4, checkpoints=None):
    bare, params = full_parameters(model) if full else (model, None)
    if params is None:
        params = lora.init(model, 2, 4, ("q", "v"), key=jax.random.key(0))
    return finetune(
        bare, params, defence, streams(packing, defence),
        optimizer=make_optimizer(1e-3, partial=defence.partial),
        steps=steps, checkpoints=checkpoints,
    )  # fmt: skip


def test_every_method_with_steps_is_tried_or_refused():
    tried = {type(defence) for defence in METHODS}
    with_steps = {kind for name, kind in DEFENCES.items() if issubclass(kind, Defence)}
    refused = {kind for kind in with_steps if kind.unpackable}
    assert refused == {RepNoise, RandomVaccine}
    elsewhere = {DEFENCES["asft"]}  # which needs a model beside this one: defences/test_asft.py
    assert tried | refused == with_steps - {DEFENCES["realign"], DEFENCES["lox"]} - elsewhere  # two whose gradient is SFT's


@pytest.mark.parametrize("defence", METHODS, ids=lambda d: f"{type(d).__name__}-{METHODS.index(d)}")
def test_every_method_takes_the_same_steps(model, defence):
    assert isinstance(defence, Defence)
    plain, packed = (run(model, defence, packing) for packing in (False, True))
    start = lora.init(model, 2, 4, ("q", "v"), key=jax.random.key(0))
    assert difference(plain.deployed, start) > 1e-3
    assert plain.compilations == packed.compilations == 1
    assert difference(packed.deployed, plain.deployed) < 1e-5


def test_panacea_on_all_parameters(model):
    defence = Panacea(rho=0.5, lam=0.3)
    plain, packed = (run(model, defence, packing, full=True) for packing in (False, True))
    assert difference(packed.deployed, plain.deployed) < 1e-5
    assert difference(packed.epsilon, plain.epsilon) < 1e-5


def test_stop_and_resume_is_bit_for_bit(model, tmp_path):
    defence = Panacea(rho=0.5, lam=0.3)
    whole = run(model, defence, True)
    assert run(model, defence, True, steps=2, checkpoints=Checkpoints(tmp_path / "c")).steps == 2
    resumed = run(model, defence, True, checkpoints=Checkpoints(tmp_path / "c"))
    assert_equal((whole.params, whole.state), (resumed.params, resumed.state))


@pytest.mark.parametrize("defence", [RepNoise(), RepNoise(paired=False), RandomVaccine()])
def test_what_looks_at_rows_is_refused(model, defence):
    with pytest.raises(InputError, match=rf"config\.data\.packing = True: {defence.facts.title} "):
        run(model, defence, True)
    with pytest.raises(InputError):
        check_packing(defence)
