"""Safe Delta in PyTorch and float64, from methods.md: hooks on the aligned model, one record at a time, H inverted, input after input."""

import numpy as np
import torch


def products(model, modules, examples):
    """By module ``Σ x xᵀ`` over all tokens of all records."""
    total = dict.fromkeys(modules, 0.0)

    def adding(name):
        def hook(module, inputs, output):
            x = inputs[0].detach()[0]
            total[name] = total[name] + x.T @ x

        return hook

    handles = [module.register_forward_hook(adding(name)) for name, module in modules.items()]
    for example in examples:
        with torch.no_grad():
            model(input_ids=torch.tensor(np.asarray(example.tokens), dtype=torch.long)[None])
    for handle in handles:
        handle.remove()
    return total


def hessian(product, records, damping):
    h = 2 * product / records
    for j in range(len(h)):
        if h[j, j] == 0:
            h[j, j] = 1
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def choose(inverse, delta, budget, guarded, rule):
    """The inputs that are kept."""
    n = len(inverse)
    u = torch.linalg.cholesky(inverse, upper=True)
    price = 1 / (u.diagonal() ** 2 if rule == "code" else inverse.diagonal())
    left, kept = budget * float(price.mean()), []
    for j in sorted(range(n), key=lambda j: float(price[j]))[: n - int(guarded * n)]:
        left -= float(price[j] * (delta[:, j] ** 2).sum())
        if left < 0:
            break
        kept.append(j)
    return kept, u


def heal(h, aligned, tuned, *, budget, guarded=0.15, rule="code", compensate=True):
    """``(W [out, in], the inputs kept)``."""
    inverse, delta = torch.linalg.inv(h), tuned - aligned
    kept, u = choose(inverse, delta, budget, guarded, rule)
    w = aligned.clone()
    if rule == "paper":
        for m in kept if compensate else []:
            w += torch.outer(delta[:, m] / inverse[m, m], inverse[:, m])
        w[:, kept] = tuned[:, kept]
        return w, kept
    for j in range(len(h)):
        q = tuned[:, j] if j in kept else w[:, j].clone()
        error = (w[:, j] - q) / u[j, j]
        w[:, j] = q
        if compensate:
            w[:, j + 1 :] -= torch.outer(error, u[j, j + 1 :])
    return w, kept


def cost(h, change):
    """½ tr(Δ H Δᵀ)."""
    return float(torch.trace(change @ h @ change.T) / 2)


def least_cost(h, kept, delta):
    """The same of the best of all changes that are Δ on the kept inputs."""
    inverse = torch.linalg.inv(h)
    best = delta[:, kept] @ torch.linalg.inv(inverse[kept][:, kept]) @ inverse[kept]
    return cost(h, best)
