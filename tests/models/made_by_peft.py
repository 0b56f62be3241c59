"""Adapters made by peft, and what peft and transformers say of them."""

import numpy as np
import peft
import torch

from tests.families import VOCAB

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 9))


def torch_model(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )


def logits(torch_model):
    with torch.no_grad():
        return torch_model.eval()(torch.tensor(TOKENS)).logits.numpy()


def reloaded(base, folder):
    """What peft makes of a folder on a base that it has not seen: its logits."""
    return logits(peft.PeftModel.from_pretrained(torch_model(base), str(folder)))


def peft_adapter(base, folder, **settings):
    """An adapter made by peft, moved away from where it starts; returns peft's logits."""
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "lora_dropout": 0.0, **settings})
    adapted = peft.get_peft_model(torch_model(base), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder))
    return logits(adapted)


def draw_b(adapted):
    """B of a fresh adapter, which peft makes zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
