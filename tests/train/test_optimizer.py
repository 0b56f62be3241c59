"""Clip, AdamW and schedules against PyTorch and transformers."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from panacea_jax.errors import InputError
from panacea_jax.train.optimizer import clip_global_norm, learning_rate, make_optimizer


@pytest.mark.parametrize("scale", [1e-3, 0.3, 50.0])
def test_clip_is_torchs(scale):
    grads = {
        "a": scale * np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": scale * np.ones(4, np.float32),
    }
    ours, _ = clip_global_norm(1.0).update(grads, optax.EmptyState())
    params = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    for p, g in zip(params, grads.values()):
        p.grad = torch.tensor(g)
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    for p, o in zip(params, ours.values()):
        np.testing.assert_allclose(o, p.grad.numpy(), rtol=1e-6)


def test_adamw_is_torchs_with_decay_on_everything():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    theirs = torch.optim.AdamW([p], lr=0.1, weight_decay=0.1)
    params, optimizer = {"p": jnp.asarray([1.0, -2.0, 3.0])}, make_optimizer(0.1, clip_norm=0.0)
    state = optimizer.init(params)
    for step in range(5):
        g = np.asarray([0.1 * step, -1.0, 0.0], np.float32)
        p.grad = torch.tensor(g)
        theirs.step()
        updates, state = optimizer.update({"p": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["p"], p.detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_schedules_are_transformers(name, theirs):
    steps = 37
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.5)
    schedule = theirs(optimizer, 4, steps)  # ceil(0.1 * 37)
    ours = learning_rate(0.5, steps, name, 0.1)
    for step in range(steps):
        assert float(ours(step)) == pytest.approx(schedule.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        schedule.step()


def test_constant_has_no_warm_up():
    assert float(learning_rate(0.5, 100, "constant", 0.1)(0)) == 0.5


def test_unknown_schedule():
    with pytest.raises(InputError, match=r"config\.optimizer\.schedule"):
        learning_rate(0.5, 100, "polynomial")
