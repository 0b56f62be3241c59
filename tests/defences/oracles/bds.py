"""BDS in PyTorch: a logit a record under an AdamW of its own, as its public code has it (methods.md §17)."""

import torch

from tests import torch_oracle as oracle


def of_records(model, batch) -> torch.Tensor:
    """Mean cross-entropy over the response tokens of each row."""
    tokens = torch.tensor(batch.tokens, dtype=torch.long)
    valid = torch.tensor(batch.valid, dtype=torch.long)
    logits = model(input_ids=tokens, attention_mask=valid).logits[:, :-1]
    mask = torch.tensor(batch.loss_mask)[:, 1:]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return (each * mask).sum(1) / mask.sum(1)


def gradients(model, user, alignment, steps, *, rate, learnt, sigmoid=False):
    """One gradient a step; the logits after each are appended to ``learnt``."""
    n = len(user.examples)
    z = torch.nn.Parameter(torch.zeros(n, dtype=model.dtype))
    optimizer = torch.optim.AdamW([z], lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for t in range(steps):
        [numbers] = user.numbers(t)
        weights = (2 * z.sigmoid() if sigmoid else n * z.softmax(0))[numbers]
        losses = of_records(model, user.batch(t))
        total = of_records(model, alignment.batch(t)).mean() + (weights.detach() * losses).mean()
        found = oracle.gradients(model, total)
        optimizer.zero_grad()
        (weights * losses.detach()).mean().backward()
        optimizer.step()
        learnt.append(z.detach().numpy().copy())
        yield found
