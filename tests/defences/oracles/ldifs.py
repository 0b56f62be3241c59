"""LDIFS in PyTorch: hooks on the MLPs of the model and of a copy of it (methods.md §8), valid tokens only."""

import copy

import torch

from tests import torch_oracle as oracle


def features(model, batch) -> list[torch.Tensor]:
    """Outputs of every MLP at valid tokens, ``[tokens, D]`` a layer."""
    seen = []
    handles = [
        m.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for name, m in model.named_modules()
        if name.endswith(".mlp")
    ]
    oracle.loss(model, batch)
    for handle in handles:
        handle.remove()
    return [output[torch.tensor(batch.valid)] for output in seen]


def gradients(model, user, alignment, steps, *, rho, gate=None, counted=None):
    """One gradient a step. Without ``gate`` every layer counts, by its mean; ``counted`` gets the number of layers that did."""
    start = copy.deepcopy(model)
    for t in range(steps):
        batch = user.batch(t)
        loss = oracle.loss(model, batch)
        with torch.no_grad():
            reference = features(start, batch)
        n = 0
        for mine, theirs in zip(features(model, batch), reference):
            square = (mine - theirs) ** 2
            if gate is None:
                loss = loss + rho / 2 * square.mean()
            elif (q := rho / 2 * square.sum()) < gate:
                loss, n = loss + q, n + 1
        if counted is not None:
            counted.append(n)
        yield oracle.gradients(model, loss)
