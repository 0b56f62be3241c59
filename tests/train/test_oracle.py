"""Ten steps of SFT and of Panacea equal PyTorch + peft + transformers, from the same base, adapter and batches."""

import itertools

import jax
import numpy as np
import pytest
import torch

from panacea_jax.data.batches import Stream, length_buckets
from panacea_jax.data.encode import Example
from panacea_jax.defences import Panacea, Sft
from panacea_jax.export import epsilon_tensors
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.models.peft import adapter_tensors, save_adapter
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests import torch_oracle as oracle
from tests.families import VOCAB, build, save

STEPS = 10
LR = 1e-3


def examples(seed, n=23):
    """Of one answer and, every other one, of two with something between them that is not learnt."""
    rng = np.random.default_rng(seed)
    out = []
    for number in range(n):
        length = int(rng.integers(8, 30))
        tokens = rng.integers(0, VOCAB, length).astype(np.int32)
        prompt = int(rng.integers(2, length - 2))
        mask = np.arange(length) >= prompt
        if number % 2:
            between = (prompt + length) // 2
            mask[between : between + 2] = False
        out.append(Example(tokens, mask))
    return out


def streams():
    buckets = length_buckets(32)
    return {
        "user": Stream("user", examples(1), 4, 0, False, buckets),
        "harmful": Stream("harmful", examples(2), 4, 0, False, buckets, fixed_length=True),
    }


@pytest.fixture(params=["float32", "float64"])
def setting(request, tmp_path, monkeypatch):
    """(model, adapter, folders, relative tolerance)."""
    wide = request.param == "float64"
    if wide:
        oracle.use_float64_throughout(monkeypatch)
    yield from make_setting("llama2", request.param, tmp_path)


def make_setting(family, dtype, tmp_path):
    wide = dtype == "float64"
    with jax.enable_x64(wide):
        base = save(build(family), tmp_path / "base")
        model = load(base, dtype=dtype)
        adapter = lora.init(
            model, 4, 8, ("q", "k", "v", "down"), key=jax.random.key(0), dtype=dtype
        )
        # B away from zero, as after alignment: from B = 0 the gradient of A is zero at first.
        layers = jax.tree.map(
            lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype),
            adapter.layers,
        )
        adapter = lora.Adapter(layers, adapter.rank, adapter.alpha)
        save_adapter(adapter, tmp_path / "adapter", str(base))
        yield model, adapter, (base, tmp_path / "adapter"), (1e-8 if wide else 1e-4)


def assert_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        error = np.linalg.norm(ours[name] - value) / np.linalg.norm(value)
        assert error < tolerance, f"{name}: {error:.2e}"


def run_both(setting, defence, **kwargs):
    model, adapter, (base, folder), tolerance = setting
    ours = finetune(model, adapter, defence, streams(), optimizer=make_optimizer(LR), steps=STEPS)
    theirs = oracle.load(base, folder, getattr(torch, str(model.dtype)))
    batches = [(streams()["user"].batch(t), streams()["harmful"].batch(t)) for t in range(STEPS)]
    epsilon = oracle.train(theirs, batches, lr=LR, weight_decay=0.1, **kwargs)
    start = adapter_tensors(adapter)
    moved = adapter_tensors(ours.params)
    assert all(
        np.linalg.norm(moved[n] - start[n]) > 1e-3 for n in start
    )  # the comparison is not of a standstill
    assert_close(moved, oracle.by_peft_name(oracle.trainable(theirs)), tolerance)
    return ours, theirs, epsilon, tolerance


def test_sft(setting):
    run_both(setting, Sft())


@pytest.mark.parametrize("lam", [0.3, 0.0])
def test_panacea(setting, lam):
    ours, theirs, epsilon, tolerance = run_both(
        setting, Panacea(rho=0.5, lam=lam), rho=0.5, lam=lam
    )
    assert_close(epsilon_tensors(ours.epsilon), oracle.by_peft_name(epsilon), 10 * tolerance)
    deployed = {n: p.detach() + epsilon[n] for n, p in oracle.trainable(theirs).items()}
    assert_close(adapter_tensors(ours.deployed), oracle.by_peft_name(deployed), tolerance)


def test_panacea_with_three_ascent_steps(setting):
    kwargs = {"rho": 0.5, "lam": 0.3, "ascent_steps": 3}
    ours, _, epsilon, tolerance = run_both(setting, Panacea(**kwargs), **kwargs)
    assert_close(epsilon_tensors(ours.epsilon), oracle.by_peft_name(epsilon), 10 * tolerance)
    assert_close(epsilon_tensors(ours.epsilon), oracle.by_peft_name(epsilon), 1e-8 if tolerance < 1e-6 else 1)  # fmt: skip


@pytest.fixture(params=["qwen3", "gemma3"])
def newer(request, tmp_path):
    yield from make_setting(request.param, "float32", tmp_path)


def test_sft_and_panacea_of_newer_families(newer):
    """Single precision, since transformers keeps norms and rotary angles in it; all parameters too, the norms of q and k among them."""
    run_both(newer, Sft())
    ours, _, epsilon, tolerance = run_both(newer, Panacea(rho=0.5, lam=0.3), rho=0.5, lam=0.3)
    assert_close(epsilon_tensors(ours.epsilon), oracle.by_peft_name(epsilon), 10 * tolerance)
    test_all_parameters(newer)


@pytest.mark.parametrize("clamp", ["reference", "none"])
def test_panacea_beyond_the_clamp(setting, clamp):
    """ρ so large that the loss at w + ε is above 5 on every step: the reference rule becomes g + λh."""
    kwargs = {"rho": 4.0, "lam": 0.2, "clamp": clamp == "reference"}
    ours, *_ = run_both(setting, Panacea(rho=4.0, lam=0.2, clamp=clamp), **kwargs)
    assert float(ours.state.measured["harmful_loss_perturbed"]) > 5


def test_all_parameters(setting):
    model, _, (base, _), tolerance = setting
    bare, params = full_parameters(model)
    ours = finetune(
        bare,
        params,
        Panacea(rho=0.1, lam=0.3),
        streams(),
        optimizer=make_optimizer(LR),
        steps=STEPS,
    )
    theirs = oracle.load_full(base, getattr(torch, str(model.dtype)))
    batches = itertools.islice(
        ((streams()["user"].batch(t), streams()["harmful"].batch(t)) for t in itertools.count()),
        STEPS,
    )
    epsilon = oracle.train(theirs, batches, lr=LR, weight_decay=0.1, rho=0.1, lam=0.3)
    assert_close(
        epsilon_tensors(ours.params), oracle.by_peft_name(oracle.trainable(theirs)), tolerance
    )
    assert_close(epsilon_tensors(ours.epsilon), oracle.by_peft_name(epsilon), 10 * tolerance)
