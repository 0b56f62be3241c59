"""Five steps of an alignment-stage method, ours and PyTorch's, from one base, one adapter and the same batches."""

import jax
import numpy as np
import pytest
import torch

from panacea_jax.data.batches import Stream
from panacea_jax.data.encode import Example
from panacea_jax.export import epsilon_tensors
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.models.peft import adapter_tensors, save_adapter
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests import torch_oracle as oracle
from tests.families import VOCAB, build, save

STEPS = 5
LR = 1e-3
BATCH = 4


def examples(seed, n=11, vocab=VOCAB):
    """Record i has the same prompt whatever the seed, so that two sets are pairs."""
    rng, prompts = np.random.default_rng(seed), np.random.default_rng(0)
    out = []
    for _ in range(n):
        prompt = prompts.integers(0, vocab, int(prompts.integers(2, 9)))
        answer = rng.integers(0, vocab, int(rng.integers(4, 20)))
        out.append(Example.answering(np.concatenate([prompt, answer]).astype(np.int32), len(prompt)))
    return out


def streams(repeats=1):
    """Of one shape each, so that a step is compiled once; the harmful batch is the longer one."""
    return {
        "user": Stream("user", examples(1), BATCH, 0, False, (28,)),
        "harmful": Stream("harmful", examples(2), BATCH, 0, False, (30,), repeats=repeats),
    }


@pytest.fixture(params=["float32", "float64"])
def setting(request, tmp_path, monkeypatch):
    """(model, adapter, (base folder, adapter folder), relative tolerance)."""
    yield from make_setting(request.param, tmp_path, monkeypatch)


@pytest.fixture
def wide_setting(tmp_path, monkeypatch):
    """The same in float64 alone."""
    yield from make_setting("float64", tmp_path, monkeypatch)


def make_setting(dtype, tmp_path, monkeypatch):
    wide = dtype == "float64"
    if wide:
        oracle.use_float64_throughout(monkeypatch)
    with jax.enable_x64(wide):
        base = save(build("llama2"), tmp_path / "base")
        model = load(base, dtype=dtype)
        adapter = lora.init(
            model, 4, 8, ("q", "k", "v", "down"), key=jax.random.key(0), dtype=dtype
        )
        # B away from zero, as in the middle of training: from B = 0 the gradient of A is zero at first.
        layers = jax.tree.map(
            lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype),
            adapter.layers,
        )
        adapter = lora.Adapter(layers, adapter.rank, adapter.alpha)
        save_adapter(adapter, tmp_path / "adapter", str(base))
        yield model, adapter, (base, tmp_path / "adapter"), (1e-8 if wide else 1e-4)


def run(setting, defence, given, full=False):
    """(what came out, ours by PEFT or Hugging Face name)."""
    model, adapter, _, _ = setting
    model, params = full_parameters(model) if full else (model, adapter)
    ours = finetune(model, params, defence, given, optimizer=make_optimizer(LR), steps=STEPS)
    return ours, (epsilon_tensors if full else adapter_tensors)(ours.params)


def torch_model(setting, full=False):
    model, _, (base, folder), _ = setting
    dtype = getattr(torch, str(model.dtype))
    return oracle.load_full(base, dtype) if full else oracle.load(base, folder, dtype)


def torch_steps(theirs, gradient):
    """Five steps of ``clip 1.0 → AdamW``; ``gradient(step)`` gives a tensor for each trainable one."""
    params = list(oracle.trainable(theirs).values())
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.1, eps=1e-8, betas=(0.9, 0.999))
    for step in range(STEPS):
        for p, g in zip(params, gradient(step)):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def assert_equal_tensors(ours, theirs, start, tolerance):
    """Every tensor within the tolerance, and none a standstill. Prints the largest relative error."""
    theirs = oracle.by_peft_name(oracle.trainable(theirs))
    assert ours.keys() == theirs.keys()
    moved = {n: np.linalg.norm(theirs[n] - start[n]) for n in start}
    assert min(moved.values()) > 1e-3, moved
    errors = {n: np.linalg.norm(ours[n] - t) / np.linalg.norm(t) for n, t in theirs.items()}
    worst = max(errors, key=lambda n: errors[n])
    print(f"largest relative error {errors[worst]:.1e} ({worst}), tolerance {tolerance:.0e}")
    assert errors[worst] < tolerance, (worst, errors[worst])


def start_tensors(setting, full=False):
    model, adapter, _, _ = setting
    return epsilon_tensors(full_parameters(model)[1]) if full else adapter_tensors(adapter)
