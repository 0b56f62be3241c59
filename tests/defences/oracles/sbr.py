"""SBR in PyTorch: transformers' last hidden state at the end of each prompt, one prompt at a time and hence without padding."""

import torch

from tests import torch_oracle as oracle


def prompts_of(examples, count) -> list[torch.Tensor]:
    """Ids of the first prompts: what stands before the first token that is learnt."""
    return [torch.tensor(e.tokens[: int(e.loss_mask.argmax())], dtype=torch.long) for e in examples[:count]]


def ends(model, prompts) -> torch.Tensor:
    """``[K, D]``."""
    return torch.stack([model(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0, -1] for ids in prompts])


def gradients(model, user, examples, steps, *, lam, count):
    """One gradient a step."""
    prompts = prompts_of(examples, count)
    with torch.no_grad():
        start = ends(model, prompts)
    for t in range(steps):
        apart = torch.nn.functional.mse_loss(ends(model, prompts), start)
        yield oracle.gradients(model, oracle.loss(model, user.batch(t)) + lam * apart)
