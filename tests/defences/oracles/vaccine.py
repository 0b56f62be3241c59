"""Vaccine, random Vaccine and T-Vaccine in PyTorch, by hooks on the attention modules; written from the published update rules."""

import contextlib

import numpy as np
import torch

from tests import torch_oracle as oracle


def attention_modules(model):
    """By layer."""
    return [module for name, module in model.named_modules() if name.endswith("self_attn")]


@contextlib.contextmanager
def hooks(model, layers, offsets=None):
    """Outputs of some attention modules, in the order of ``layers``, their gradients kept; ``offsets`` are added to them."""
    seen = {}

    def hook(i):
        def keep(module, inputs, output):
            out = output[0] if offsets is None else output[0] + offsets[i]
            out.retain_grad()
            seen[i] = out
            return (out, *output[1:])

        return keep

    modules = attention_modules(model)
    handles = [modules[layer].register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    yield seen
    for handle in handles:
        handle.remove()


def backward(model, batch, layers, offsets=None):
    """Backward of the loss; the gradients at the outputs of the attention modules of ``layers``."""
    with hooks(model, layers, offsets) as seen:
        oracle.loss(model, batch).backward()
    return [seen[i].grad for i in range(len(layers))]


def perturb(model, batch, layers, rho):
    """Vaccine's two passes; the second leaves its gradients in the parameters."""
    g = backward(model, batch, layers)
    offsets = [rho * x / (oracle.norm(g) + 1e-7) for x in g]
    model.zero_grad()
    backward(model, batch, layers, offsets)


def probabilities(model, batch):
    """T-Vaccine's p."""
    g = backward(model, batch, range(len(attention_modules(model))))
    model.zero_grad()
    norms = torch.stack([torch.linalg.vector_norm(x) for x in g])
    return norms / norms.sum()


def train(model, batches, step, *, lr=1e-3):
    """``step(t, user, harmful)`` leaves gradients in the parameters; then clip and AdamW."""
    params = list(oracle.trainable(model).values())
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.1, eps=1e-8, betas=(0.9, 0.999))
    for t, (user, harmful) in enumerate(batches):
        step(t, user, harmful)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def vaccine(model, batches, rho):
    layers = range(len(attention_modules(model)))
    train(model, batches, lambda t, user, _: perturb(model, user, layers, rho))


def random_vaccine(model, batches, noise):
    """``noise(t)``: what is added at step t, [L, B, T, D]."""
    layers = range(len(attention_modules(model)))
    train(
        model,
        batches,
        lambda t, user, _: backward(model, user, layers, torch.tensor(np.asarray(noise(t)))),
    )


def t_vaccine(model, batches, rho, interval, importance_interval, draw, average, whole_layer):
    """``draw(t, p)``: the active layers. Returns the probabilities in use and the active layers at every step."""
    everything = oracle.trainable(model)
    looks, seen = [], []

    def step(t, user, harmful):
        nonlocal seen
        if t % importance_interval == 0:
            for parameter in everything.values():
                parameter.requires_grad = True
            looks.append(probabilities(model, harmful))
        p = torch.stack(looks).mean(0) if average else looks[-1]
        active = draw(t, p.detach().numpy()) if t % interval == 0 else seen[-1][1]
        seen.append((p.detach().numpy(), active))
        for name, parameter in everything.items():
            layer = name.split(".layers.")[-1].split(".")[0] if ".layers." in name else None
            inside = layer is not None and (whole_layer or ".self_attn." in name)
            parameter.requires_grad = not inside or int(layer) in active
        perturb(model, user, active, rho)

    train(model, batches, step)
    for parameter in everything.values():
        parameter.requires_grad = True
    return seen
