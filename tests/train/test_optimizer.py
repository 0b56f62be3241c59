"""Clip, AdamW and schedules against PyTorch and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from panacea_jax.errors import InputError
from panacea_jax.train.optimizer import (
    clip_global_norm,
    learning_rate,
    make_optimizer,
    where_trained,
)


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


def test_a_partial_optimizer_leaves_layers_out_as_torch_does():
    """Each layer a tensor of its own in PyTorch, its gradient None where it is left out; a leaf trained throughout beside them."""
    rng = np.random.default_rng(0)
    start = {"x": rng.normal(size=(3, 2)).astype(np.float32), "y": rng.normal(size=4).astype(np.float32)}  # fmt: skip
    tensors = [torch.nn.Parameter(torch.tensor(v)) for v in (*start["x"], start["y"])]
    theirs = torch.optim.AdamW(tensors, lr=0.1, weight_decay=0.1)
    params = jax.tree.map(jnp.asarray, start)
    optimizer = make_optimizer(0.1, partial=True)
    state = optimizer.init(params)
    for active in ([0, 2], [2], [2], [0, 1], [1]):
        g = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in start.items()}
        for i, p in enumerate(tensors):
            p.grad = torch.tensor(g["y"] if i == 3 else g["x"][i]) if i in (*active, 3) else None
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        theirs.step()
        mask = {"x": jnp.zeros(3, bool).at[jnp.asarray(active)].set(True), "y": jnp.ones((), bool)}
        grads = where_trained(
            mask, jax.tree.map(jnp.asarray, g), jax.tree.map(jnp.zeros_like, params)
        )
        updates, state = optimizer.update(grads, state, params, trained=mask)
        params = optax.apply_updates(params, updates)
    expected = [p.detach().numpy() for p in tensors]
    np.testing.assert_allclose(params["x"], expected[:3], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(params["y"], expected[3], rtol=1e-4, atol=1e-6)


def test_a_partial_optimizer_that_leaves_nothing_out_is_the_plain_one():
    params = {"x": jnp.arange(6.0).reshape(3, 2)}
    results = []
    for partial in (False, True):
        optimizer, w = make_optimizer(0.1, partial=partial), params
        extra = {"trained": {"x": jnp.ones(3, bool)}} if partial else {}
        state = optimizer.init(w)
        for step in range(3):
            updates, state = optimizer.update({"x": jnp.sin(w["x"] + step)}, state, w, **extra)
            w = optax.apply_updates(w, updates)
        results.append(w["x"])
    np.testing.assert_allclose(*results, rtol=1e-6)
    assert np.abs(results[0] - params["x"]).max() > 0.1
