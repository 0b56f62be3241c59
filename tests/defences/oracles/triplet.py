"""Triplet in PyTorch, from methods.md: hooks for every hidden state of the model and of a copy of it at the start."""

import copy

import numpy as np
import torch
from torch.nn.functional import cosine_similarity, log_softmax

from tests import torch_oracle as oracle
from tests.defences.oracles.repnoise import activations


def states_and_logits(model, batch):
    """Hidden states as transformers counts them, ``[L + 1, B, T, D]``, and logits."""
    seen, _, layers = activations(model, batch)
    states = [seen["embedding"], *(seen[f"layer{i}"] for i in range(layers - 1)), seen["norm"]]
    return torch.stack(states), model.get_output_embeddings()(seen["norm"])


def gradients(model, streams, steps, *, alpha, beta, lam, margins, layers, refusal=0.0, active=None):
    """One gradient a step. ``layers``: numbers of the states that the harmful hinge looks at; ``active`` gets the share of benign hinges
    that are above 0."""
    start = copy.deepcopy(model)
    for step in range(steps):
        batches = {name: streams[name].batch(step) for name in ("user", "benign", "harmful")}
        h, logits, h0, logits0, at = {}, {}, {}, {}, {}
        for name, batch in batches.items():
            h[name], logits[name] = states_and_logits(model, batch)
            with torch.no_grad():
                h0[name], logits0[name] = states_and_logits(start, batch)
            at[name] = torch.tensor(np.asarray(batch.loss_mask))
        centre = h["harmful"][:, at["harmful"]].mean(1)  # [L + 1, D]

        hinges = []
        for name in ("user", "benign"):
            for l, (x, x0) in enumerate(zip(h[name], h0[name])):
                x, x0 = x[at[name]], x0[at[name]]
                away = 1 - cosine_similarity(x, centre[l][None], dim=1)
                hinges.append((torch.linalg.vector_norm(x - x0, dim=1) - away + margins[0]).relu())
        hinges = torch.cat(hinges)
        if active is not None:
            active.append(float((hinges > 0).double().mean()))
        loss = alpha * hinges.mean()

        hinges = []
        for l in layers:
            x, x0 = h["harmful"][l][at["harmful"]], h0["harmful"][l][at["harmful"]]
            near, away = (1 - cosine_similarity(x, y, dim=1) for y in (centre[l][None].expand_as(x), x0))
            hinges.append((near - away + margins[1]).relu())
        loss = loss + beta * torch.cat(hinges).mean()

        real = torch.tensor(np.asarray(batches["benign"].valid))
        log_p, log_q = (log_softmax(x["benign"][real] / 2, dim=-1) for x in (logits0, logits))
        loss = loss + lam * 4 * (log_p.exp() * (log_p - log_q)).sum() / int(real.any(1).sum())
        if refusal:
            loss = loss + refusal * oracle.loss(model, batches["user"])
        yield oracle.gradients(model, loss)
