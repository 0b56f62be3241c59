"""RepNoise's joint loss in PyTorch, from methods.md §6: hooks for every activation, row by row, token by token."""

import numpy as np
import torch

from tests import torch_oracle as oracle


def different(harmful, harmless):
    """Real tokens of the harmful rows that are not those of the harmless rows at the same place."""
    out = np.zeros(harmful.tokens.shape, bool)
    for b, t in np.argwhere(np.asarray(harmful.valid)):
        beyond = t >= harmless.tokens.shape[1] or not harmless.valid[b, t]
        out[b, t] = beyond or harmless.tokens[b, t] != harmful.tokens[b, t]
    return torch.tensor(out)


def activations(model, batch):
    """Embedding output, outputs of layers, of MLPs, and what the last norm makes of it."""
    inner = next(m for m in model.modules() if type(m).__name__ == "LlamaModel")
    seen = {}

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    places = [("embedding", inner.embed_tokens), ("norm", inner.norm)]
    for i, layer in enumerate(inner.layers):
        places += [(f"layer{i}", layer), (f"mlp{i}", layer.mlp)]
    handles = [module.register_forward_hook(keep(name)) for name, module in places]
    tokens = torch.tensor(np.asarray(batch.tokens), dtype=torch.long)
    valid = torch.tensor(np.asarray(batch.valid), dtype=torch.long)
    model(input_ids=tokens, attention_mask=valid)
    for handle in handles:
        handle.remove()
    return seen, inner, len(inner.layers)


def kernel_mmd(x, y):
    both = torch.cat([x, y])
    n = len(both)
    distances = ((both[:, None] - both[None]) ** 2).sum(2)
    bandwidth = distances.detach().sum() / (n * n - n) / 4
    k = sum(torch.exp(-distances / (bandwidth * 2**i)) for i in range(5))
    half = n // 2
    return (k[:half, :half] + k[half:, half:] - k[:half, half:] - k[half:, :half]).mean()


def padded(batch, length):
    """Ids with padding of id 0."""
    tokens = np.where(np.asarray(batch.valid), np.asarray(batch.tokens), 0)
    return torch.tensor(np.pad(tokens, [(0, 0), (0, length - tokens.shape[1])]), dtype=torch.long)


def code_cross_entropy(logits, tokens, mask):
    """As the public code words it: logits and labels are multiplied by the mask, each at its own place; label 0 is left out."""
    logits, labels = logits[:, :-1] * mask[:, :-1, None], tokens[:, 1:] * mask[:, 1:]
    labels = torch.where(labels == 0, -100, labels)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def code_loss(model, user, harmful, noise, alpha, beta):
    """The same loss with the public code's masks, by its ids of both texts."""
    length = max(user.tokens.shape[1], harmful.tokens.shape[1])
    ids = [padded(b, length) for b in (harmful, user)]
    mask = ids[0] != ids[1]
    head = model.get_output_embeddings()

    def of_text(hidden, tokens):
        t = hidden.shape[1]
        return code_cross_entropy(head(hidden), tokens[:, :t], mask[:, :t].long())

    seen, inner, layers = activations(model, harmful)
    states = [seen["embedding"], *(seen[f"layer{i}"] for i in range(layers - 1)), seen["norm"]]
    total = of_text(seen["norm"], ids[0]) + sum(of_text(inner.norm(h), ids[0]) for h in states)
    adversary = total / (layers + 1) + 1
    mmd = noise_term(seen, layers, different(harmful, user), noise)
    harmless, _, _ = activations(model, user)
    return of_text(harmless["norm"], ids[1]) + beta * mmd - alpha * torch.log(adversary)


def noise_term(seen, layers, mask, noise):
    mmd = 0
    for i in range(layers):
        x = torch.where(mask[..., None], seen[f"mlp{i}"], 0)
        y = torch.where(mask[..., None], torch.tensor(np.asarray(noise[i])), 0)
        mmd = mmd + kernel_mmd(x.flatten(1), y.flatten(1)) / layers
    return mmd


def loss(model, user, harmful, noise, alpha, beta):
    """``noise``: one array [B, T, D] a layer."""
    seen, inner, layers = activations(model, harmful)
    head = model.get_output_embeddings()
    mask = different(harmful, user)
    tokens = torch.tensor(np.asarray(harmful.tokens), dtype=torch.long)

    def cross_entropy(hidden):
        log_p = torch.log_softmax(head(hidden), dim=-1)
        picked = [log_p[b, t - 1, tokens[b, t]] for b, t in mask.nonzero().tolist() if t > 0]
        return -torch.stack(picked).mean()

    states = [seen["embedding"], *(seen[f"layer{i}"] for i in range(layers - 1)), seen["norm"]]
    total = cross_entropy(seen["norm"]) + sum(cross_entropy(inner.norm(h)) for h in states)
    adversary = total / (layers + 1) + 1
    mmd = noise_term(seen, layers, mask, noise)
    return oracle.loss(model, user) + beta * mmd - alpha * torch.log(adversary)
