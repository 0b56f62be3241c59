"""Tiny Hugging Face models of every family, built by transformers with random weights."""

from pathlib import Path
from typing import Any

import torch
import transformers as tf

VOCAB = 96

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
}

# Windows are shorter than every prompt used in the tests, and soft caps low enough to matter.
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama2": (tf.LlamaConfig, tf.LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama3.1": (
        tf.LlamaConfig,
        tf.LlamaForCausalLM,
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama_biased": (
        tf.LlamaConfig,
        tf.LlamaForCausalLM,
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        },
    ),
    "mistral": (tf.MistralConfig, tf.MistralForCausalLM, {"sliding_window": 5}),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, {}),
    "qwen2_tied": (
        tf.Qwen2Config,
        tf.Qwen2ForCausalLM,
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen3_tied": (
        tf.Qwen3Config,
        tf.Qwen3ForCausalLM,
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "gemma": (tf.GemmaConfig, tf.GemmaForCausalLM, {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        tf.Gemma2Config,
        tf.Gemma2ForCausalLM,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 5,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    # Two layers with a window to one without; bases so small that every token turns, and by another angle in each.
    "gemma3": (
        tf.Gemma3TextConfig,
        tf.Gemma3ForCausalLM,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 4,  # attention so sharp that greedy texts wander
            "sliding_window": 5,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
}

# Published models that are settings of the families above, and new in no other way.
SETTINGS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama3.2": (
        tf.LlamaConfig,
        tf.LlamaForCausalLM,
        {
            "tie_word_embeddings": True,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "smollm2": (
        tf.LlamaConfig,
        tf.LlamaForCausalLM,
        {
            "tie_word_embeddings": True,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    # 5 · 4 ≠ 48: the head size is not the width by the heads, as in Mistral Nemo.
    "mistral_nemo": (
        tf.MistralConfig,
        tf.MistralForCausalLM,
        {
            "head_dim": 20,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
}


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A transformers model; norms and biases are random too, so that ignoring one shows."""
    config_class, model_class, settings = (FAMILIES | SETTINGS)[family]
    torch.manual_seed(seed)
    return _random(model_class(config_class(**{**_COMMON, **settings, **changes}))).to(dtype)


def build_nested(seed: int = 0) -> Any:
    """Gemma 3 with a vision tower beside the decoder."""
    tower = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    torch.manual_seed(seed)
    text = {**_COMMON, **FAMILIES["gemma3"][2]}
    config = tf.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=1)
    return _random(tf.Gemma3ForConditionalGeneration(config))


def _random(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
        if model.config.tie_word_embeddings:  # otherwise the last token predicts itself for ever
            model.get_input_embeddings().weight.mul_(0.2)
    return model.eval()


def save(model: Any, folder: Path, **kwargs: Any) -> Path:
    model.save_pretrained(folder, **kwargs)
    return folder
