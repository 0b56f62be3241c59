"""KL in PyTorch: ``torch.nn.functional.kl_div`` from a frozen copy (methods.md §10), softmax over the vocabulary."""

import copy

import torch

from tests import torch_oracle as oracle


def divergence(student, teacher, mask) -> torch.Tensor:
    """``kl_div(student, teacher)``, "batchmean", of logits ``[B, T, V]``; positions out of the mask are made to agree."""
    log_p = torch.log_softmax(teacher, dim=-1)
    log_q = torch.where(mask[..., None], torch.log_softmax(student, dim=-1), log_p)
    return torch.nn.functional.kl_div(log_q, log_p.exp(), reduction="batchmean")


def gradients(model, user, alignment, steps, *, lam):
    """One gradient a step."""
    teacher = copy.deepcopy(model)
    for t in range(steps):
        batch = user.batch(t)
        inputs = {
            "input_ids": torch.tensor(batch.tokens, dtype=torch.long),
            "attention_mask": torch.tensor(batch.valid, dtype=torch.long),
        }
        with torch.no_grad():
            expected = teacher(**inputs).logits[:, :-1]
        mask = torch.tensor(batch.loss_mask)[:, 1:]
        apart = divergence(model(**inputs).logits[:, :-1], expected, mask)
        yield oracle.gradients(model, oracle.loss(model, batch) + lam * apart)
