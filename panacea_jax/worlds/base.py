"""The miniature base model: a small Llama, or its like, as a Hugging Face folder, random weights and a word-level tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tokenizers import Tokenizer, models, pre_tokenizers

from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import random_model
from panacea_jax.models.saving import save_weights
from panacea_jax.parallel import make_mesh

SPECIAL = ("<pad>", "<eos>", "<unk>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}assistant {{ m['content'] }} {{ eos_token }}{% else %}"
    "{{ m['role'] }} : {{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
ROLES = ("user", "assistant", ":")

# About 1/sqrt(hidden size): a model this shallow learns slowly from Hugging Face's 0.02.
STDDEV = 0.07

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def write_base(folder: Path, words: Sequence[str], seed: int, **shape: Any) -> None:
    """Write the folder: config.json, safetensors, tokenizer with a chat template.

    Args:
        folder: to be made.
        words: the world's vocabulary.
        seed: of the weights.
        shape: keys of config.json that differ from the miniature's.
    """
    vocabulary = [*SPECIAL, *sorted({*words, *ROLES})]
    config = LLAMA | shape | {"vocab_size": len(vocabulary)}
    mesh = make_mesh(devices=jax.devices()[:1])
    model = random_model(config_from_dict(config), jax.random.key(seed), mesh=mesh, stddev=STDDEV)
    save_weights(model.weights, folder, config)
    _tokenizer(vocabulary).save_pretrained(str(folder))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 1, "pad_token_id": 0}) + "\n"
    )


def _tokenizer(vocabulary: Sequence[str]) -> Any:
    """One token a word, words parted by spaces (which is also how a tokenizer without a decoder puts them together again)."""
    from transformers import (
        PreTrainedTokenizerFast,  # takes a second, and commands read the names of worlds
    )

    ids = {word: i for i, word in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
