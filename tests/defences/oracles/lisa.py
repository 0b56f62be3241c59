"""Lisa in PyTorch: two states and two snapshots, as the published update rule has them (methods.md §7)."""

import torch

from tests import torch_oracle as oracle

OTHER = {"alignment": "finetune", "finetune": "alignment"}


def gradients(model, user, alignment, steps, *, rho, k1, k2, warmup):
    """One gradient a step; the caller moves the model in between."""
    params = list(oracle.trainable(model).values())

    def snapshot() -> list[torch.Tensor]:
        return [p.detach().clone() for p in params]

    ends = {"alignment": snapshot(), "finetune": snapshot()}
    length = {"alignment": k1, "finetune": k2}
    status, clock = "alignment" if k1 else "finetune", 0
    for t in range(steps):
        if clock == length[status] and length[OTHER[status]]:
            ends[status] = snapshot()
            status, clock = OTHER[status], 0
        loss = oracle.loss(model, alignment.batch(t) if status == "alignment" else user.batch(t))
        if t >= warmup:
            for p, reference in zip(params, ends[OTHER[status]]):
                loss = loss + rho / 2 * torch.norm(p - reference) ** 2
        clock += 1
        yield oracle.gradients(model, loss)
