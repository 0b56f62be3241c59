"""Constrained SFT in PyTorch: the paper's eq. 3 differentiated as it stands, token by token, with a frozen copy; its floor apart."""

import copy

import torch

from tests import torch_oracle as oracle

FLOOR = 1e-3


def log_probs(model, batch) -> torch.Tensor:
    """``log π(next token)``, ``[B, T − 1]``."""
    tokens = torch.tensor(batch.tokens, dtype=torch.long)
    valid = torch.tensor(batch.valid, dtype=torch.long)
    logits = model(input_ids=tokens, attention_mask=valid).logits[:, :-1]
    return torch.log_softmax(logits, dim=-1).gather(2, tokens[:, 1:, None])[..., 0]


def loss(mine, theirs, learnt, *, beta, first, early, count, floored=None) -> torch.Tensor:
    """The mean over tokens; ``floored`` gets the number of those whose weight is at its floor."""
    terms, low = [], 0
    for ours, start, row in zip(mine, theirs, learnt):
        t = 0
        for place, counts in enumerate(row.tolist()):
            t = t + 1 if counts else 0
            if not counts:
                continue
            b = beta * (first if t == 1 else early) if t <= count else beta
            gain = ours[place] - start[place]
            if 2 * float(torch.sigmoid(-b * gain.detach())) < FLOOR:
                terms.append(-FLOOR * ours[place])
                low += 1
            else:
                terms.append(-2 / b * torch.nn.functional.logsigmoid(b * gain))
    if floored is not None:
        floored.append(low)
    return torch.stack(terms).mean()


def gradients(model, user, steps, **hyper):
    """One gradient a step."""
    start = copy.deepcopy(model)
    for t in range(steps):
        batch = user.batch(t)
        with torch.no_grad():
            reference = log_probs(start, batch)
        yield oracle.gradients(model, loss(log_probs(model, batch), reference, batch.loss_mask[:, 1:], **hyper))
