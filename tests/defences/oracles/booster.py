"""Booster and Booster + Vaccine in PyTorch, from methods.md §5 and §2."""

import torch

from tests import torch_oracle as oracle


def vaccine_gradient(model, batch, rho):
    """Gradient at attention outputs moved ρ along their own gradients, by hooks on the attention modules."""
    attention = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    seen, moves = [], []

    def hook(i):
        def run(module, inputs, output):
            out = output[0]
            if moves:
                return (out + moves[i], *output[1:])
            seen.append(out)
            return None

        return run

    handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(attention)]
    found = torch.autograd.grad(oracle.loss(model, batch), seen)
    moves += [rho * g / (oracle.norm(found) + 1e-7) for g in found]
    grads = oracle.gradients(model, oracle.loss(model, batch))
    for handle in handles:
        handle.remove()
    return grads


def gradient(model, user, harmful, lam, alpha, rho=None):
    params = list(oracle.trainable(model).values())
    kept = [p.detach().clone() for p in params]
    h = oracle.gradients(model, oracle.loss(model, harmful))
    with torch.no_grad():
        for p, x in zip(params, h):
            p -= alpha * x / (oracle.norm(h) + 1e-7)
    h_attacked = oracle.gradients(model, oracle.loss(model, harmful))
    with torch.no_grad():
        for p, k in zip(params, kept):
            p.copy_(k)
    if rho is None:
        f = oracle.gradients(model, oracle.loss(model, user))
    else:
        f = vaccine_gradient(model, user, rho)
    return [a + lam * (b - c) for a, b, c in zip(f, h, h_attacked)]
