"""An independent implementation of SFT and Panacea: PyTorch, transformers and peft, written from the published update rule.

It shares nothing with our code but the batches (numpy arrays) and the folders on disk.
"""

import json
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama


def use_float64_throughout(monkeypatch) -> None:
    """transformers pins norms and rotary angles to float32; the float64 comparison needs them in the model's own dtype."""

    def norm(self, x):
        return (
            self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    def rotary(self, x, position_ids):
        dim = self.config.hidden_size // self.config.num_attention_heads
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        angles = position_ids[..., None].double() * 10000.0 ** (-exponents)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotary)


def load(base: Path, adapter: Path, dtype: torch.dtype):
    """The base with a trainable adapter."""
    # sdpa, because the eager path takes its softmax in float32
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="sdpa")
    model = PeftModel.from_pretrained(
        model, str(adapter), is_trainable=True, autocast_adapter_dtype=False
    )
    return model.to(dtype)


def load_full(base: Path, dtype: torch.dtype):
    """The base with every parameter trainable."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="sdpa")


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def loss(model, batch) -> torch.Tensor:
    """Mean cross-entropy over the response tokens of the whole batch."""
    tokens = torch.tensor(np.asarray(batch.tokens), dtype=torch.long)
    valid = torch.tensor(np.asarray(batch.valid), dtype=torch.long)
    logits = model(input_ids=tokens, attention_mask=valid).logits[:, :-1]
    mask = torch.tensor(np.asarray(batch.loss_mask))[:, 1:]
    return torch.nn.functional.cross_entropy(logits[mask], tokens[:, 1:][mask])


def answers_loss(model, base: Path, source: Path, max_length: int = 256) -> tuple[float, int]:
    """Σ of −log p over output and EOS of instruction/output pairs in chat form, and their number; one record at a time."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    total, tokens = 0.0, 0
    for line in source.read_text().splitlines():
        record = json.loads(line)
        turns = [{"role": "user", "content": record["instruction"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        whole = prompt + record["output"] + tokenizer.eos_token
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        ids = tokenizer(whole, add_special_tokens=False).input_ids[:max_length]
        labels = [-100] * min(start, len(ids)) + ids[start:]
        n = sum(label != -100 for label in labels)
        if n:
            with torch.no_grad():
                value = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
            total, tokens = total + n * float(value), tokens + n
    return total, tokens


def gradients(model, value: torch.Tensor) -> list[torch.Tensor]:
    params = list(trainable(model).values())
    found = torch.autograd.grad(value, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found)]


def norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.sqrt(sum((t**2).sum() for t in tensors))


def panacea_gradient(
    model, user, harmful, rho: float, lam: float, clamp: bool, ascent_steps: int = 1
):
    """g − λ(h' − h) and ε, with further ascent steps each brought back onto the ball."""
    params = list(trainable(model).values())
    g = gradients(model, loss(model, user))
    h = gradients(model, loss(model, harmful))
    scale = rho / (norm(h) + 1e-7)
    epsilon = [scale * x for x in h]
    kept = [p.detach().clone() for p in params]

    def stand_at(epsilon):
        with torch.no_grad():
            for p, k, e in zip(params, kept, epsilon):
                p.copy_(k + e)

    for _ in range(ascent_steps - 1):
        stand_at(epsilon)
        up = gradients(model, loss(model, harmful))
        epsilon = [e + rho * u / (norm(up) + 1e-7) for e, u in zip(epsilon, up)]
        shrink = min(1.0, rho / float(norm(epsilon)))
        epsilon = [shrink * e for e in epsilon]
    stand_at(epsilon)
    perturbed = loss(model, harmful)
    h2 = gradients(model, torch.clamp(perturbed, max=5.0) if clamp else perturbed)
    with torch.no_grad():
        for p, k in zip(params, kept):
            p.copy_(k)
    return [a - lam * (c - b) for a, b, c in zip(g, h, h2)], epsilon


def train(
    model,
    batches,
    *,
    lr: float,
    weight_decay: float,
    rho=None,
    lam=None,
    clamp=True,
    ascent_steps=1,
):
    """Ten or so steps; ``batches`` yields (user, harmful). Returns the last ε by name (None for SFT)."""
    params = trainable(model)
    optimizer = torch.optim.AdamW(
        params.values(), lr=lr, weight_decay=weight_decay, eps=1e-8, betas=(0.9, 0.999)
    )
    epsilon = None
    for user, harmful in batches:
        if rho is None:
            grads = gradients(model, loss(model, user))
        else:
            grads, epsilon = panacea_gradient(model, user, harmful, rho, lam, clamp, ascent_steps)
        for p, g in zip(params.values(), grads):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return None if epsilon is None else dict(zip(params, epsilon))


def by_peft_name(tensors) -> dict[str, np.ndarray]:
    """Names as PEFT saves them: without the adapter's name."""
    return {n.replace(".default", ""): t.detach().numpy() for n, t in tensors.items()}
