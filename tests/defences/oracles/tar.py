"""TAR's outer step in PyTorch, from methods.md §9: a real inner AdamW, weights saved and restored."""

import math

import numpy as np
import torch

from tests import torch_oracle as oracle
from tests.defences.oracles.repnoise import activations


def entropy_loss(model, batch):
    tokens = torch.tensor(np.asarray(batch.tokens), dtype=torch.long)
    valid = torch.tensor(np.asarray(batch.valid))
    logits = model(input_ids=tokens, attention_mask=valid.long()).logits[valid]
    return -torch.distributions.Categorical(logits=logits).entropy().mean()


def hidden_states(model, batch):
    seen, _, layers = activations(model, batch)
    return [seen["embedding"], *(seen[f"layer{i}"] for i in range(layers - 1)), seen["norm"]]


def gradient(model, user, attack, held_out, reference, *, every, rate, tamper, retain):
    """``attack``: one batch a step of the adversary. ``reference``: a second model, the start of alignment."""
    params = list(oracle.trainable(model).values())
    kept = [p.detach().clone() for p in params]
    buffer = [torch.zeros_like(p) for p in params]
    adversary = torch.optim.AdamW(params, lr=rate)
    for i, batch in enumerate(attack):
        for p, g in zip(params, oracle.gradients(model, oracle.loss(model, batch))):
            p.grad = g
        adversary.step()
        adversary.zero_grad()
        if (i + 1) % every == 0:
            weight = tamper * math.exp(0.0625 * (i - (len(attack) - 1)))
            found = oracle.gradients(model, entropy_loss(model, held_out))
            buffer = [b + weight * g for b, g in zip(buffer, found)]
    with torch.no_grad():
        for p, k in zip(params, kept):
            p.copy_(k)
    with torch.no_grad():
        there = hidden_states(reference, user)
    valid = torch.tensor(np.asarray(user.valid))
    here = hidden_states(model, user)
    drift = torch.stack([torch.norm((a - b)[valid], dim=-1).mean() for a, b in zip(here, there)])
    loss = oracle.loss(model, user) + drift.mean()
    return [retain * g + b for g, b in zip(oracle.gradients(model, loss), buffer)]
