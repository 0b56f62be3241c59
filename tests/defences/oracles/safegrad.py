"""SafeGrad in PyTorch: two gradients as two long vectors, the one taken off the other where they conflict (methods.md §16)."""

import copy

import torch

from tests import torch_oracle as oracle


def gradients(model, user, alignment, steps, *, rho, conflicts=None):
    """One gradient a step; whether each was projected is appended to ``conflicts``."""
    teacher = copy.deepcopy(model)
    for t in range(steps):
        task = oracle.gradients(model, oracle.loss(model, user.batch(t)))
        batch = alignment.batch(t)
        inputs = {
            "input_ids": torch.tensor(batch.tokens, dtype=torch.long),
            "attention_mask": torch.tensor(batch.valid, dtype=torch.long),
        }
        mask = torch.tensor(batch.loss_mask)[:, 1:]
        with torch.no_grad():
            expected = teacher(**inputs).logits[:, :-1][mask].softmax(-1)
        student = model(**inputs).logits[:, :-1][mask].log_softmax(-1)
        # One row a position, so "batchmean" is their mean.
        safe = oracle.gradients(model, torch.nn.functional.kl_div(student, expected, reduction="batchmean"))
        g, a = (torch.cat([x.reshape(-1) for x in tree]) for tree in (task, safe))
        told = bool(a.norm() > 1e-5 * g.norm())
        conflict = told and bool(g @ a < 0)
        if conflicts is not None:
            conflicts.append(conflict)
        if conflict:
            g = g - (g @ a) / (a @ a) * a
        pieces = torch.split(g + told * rho * a, [x.numel() for x in task])
        yield [piece.reshape(x.shape) for piece, x in zip(pieces, task)]
