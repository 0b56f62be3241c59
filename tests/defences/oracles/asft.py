"""AsFT in PyTorch: Ĉ = V Vᵀ / ‖V‖_F is formed and multiplied out (methods.md §16)."""

import torch

from tests import torch_oracle as oracle


def modules(model, before):
    """Of each module what V is, and a function that gives its weights' change since now."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (getattr(module, f"lora_{letter}")["default"].weight for letter in "AB")
            a0, b0 = a.detach().clone(), b.detach().clone()
            kernel = module.base_layer.weight.detach()
            name = name.removeprefix("base_model.model.")
            v = kernel + module.scaling["default"] * b0 @ a0 - before[f"{name}.weight"]
            found.append((v, lambda a=a, b=b, a0=a0, b0=b0: b @ a - b0 @ a0))
    if not found:
        for name, w in model.named_parameters():
            if name.endswith("_proj.weight"):
                w0 = w.detach().clone()
                found.append((w0 - before[name], lambda w=w, w0=w0: w - w0))
    return found


def gradients(model, user, alignment, steps, *, lam, before):
    """One gradient a step; ``before`` are the weights before alignment, by name."""
    dtype = next(model.parameters()).dtype
    pairs = modules(model, {name: x.to(dtype) for name, x in before.items()})
    for t in range(steps):
        loss = oracle.loss(model, user.batch(t))
        for v, change in pairs:
            projection = v @ v.T / torch.linalg.norm(v)
            loss = loss + lam * torch.linalg.norm((torch.eye(len(v), dtype=dtype) - projection) @ change()) ** 2
        yield oracle.gradients(model, loss)
