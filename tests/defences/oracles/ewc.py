"""EWC in PyTorch: Fisher information over the alignment set once, then a weighted pull to the start (methods.md §10)."""

import torch

from tests import torch_oracle as oracle


def fisher(model, alignment) -> list[torch.Tensor]:
    """Sum over batches of the squared gradient of the batch mean."""
    total = [torch.zeros_like(p) for p in oracle.trainable(model).values()]
    for batch in alignment.once():
        for f, g in zip(total, oracle.gradients(model, oracle.loss(model, batch))):
            f += g**2
    return total


def gradients(model, user, alignment, steps, *, lam):
    """One gradient a step."""
    params = list(oracle.trainable(model).values())
    start, importance = [p.detach().clone() for p in params], fisher(model, alignment)
    for t in range(steps):
        loss = oracle.loss(model, user.batch(t))
        for p, s, f in zip(params, start, importance):
            loss = loss + lam * (f * (p - s) ** 2).sum()
        yield oracle.gradients(model, loss)
