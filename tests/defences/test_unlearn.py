"""Unlearning subtracts the closed-form ε of the attacker's records, here found by PyTorch."""

import numpy as np
import torch

from panacea_jax.defences import Unlearn
from panacea_jax.models.peft import adapter_tensors
from panacea_jax.train.held_out import sum_nll
from panacea_jax.train.once import apply_once
from tests import torch_oracle as oracle
from tests.defences.five_steps import (
    assert_equal_tensors,
    setting,
    start_tensors,
    streams,
    torch_model,
)

__all__ = ["setting"]  # a fixture
RHO = 0.7


def test_against_pytorch(setting):
    """The gradient over all records together, in which each token has one weight; and the loss that it is of falls."""
    model, adapter, _, tolerance = setting
    attack, theirs = streams()["harmful"], torch_model(setting)
    ours = apply_once(model, adapter, Unlearn(rho=RHO), {"attack": attack}).deployed

    batches = list(attack.once())
    tokens = [int(batch.loss_mask[:, 1:].sum()) for batch in batches]
    assert len(set(tokens)) > 1
    loss = sum(n * oracle.loss(theirs, batch) for n, batch in zip(tokens, batches)) / sum(tokens)
    h = oracle.gradients(theirs, loss)
    with torch.no_grad():
        for parameter, x in zip(oracle.trainable(theirs).values(), h):
            parameter -= RHO * x / (oracle.norm(h) + 1e-7)
    found = adapter_tensors(ours)
    assert_equal_tensors(found, theirs, start_tensors(setting), tolerance)

    moved = [np.asarray(found[n]) - x for n, x in start_tensors(setting).items()]
    np.testing.assert_allclose(np.sqrt(sum((x**2).sum() for x in moved)), RHO, rtol=1e-5)
    before, after = (sum_nll(model, w, attack.examples, 4)[0] for w in (adapter, ours))
    assert after < before
