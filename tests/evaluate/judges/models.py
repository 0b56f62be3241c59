"""Tiny random judges on disk, made by transformers, with a word-level tokenizer: invented words only."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from panacea_jax.config import get_config
from panacea_jax.data.categories import CATEGORIES

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [*(f"w{i}" for i in range(60)), "safe", "unsafe", "yes", "no", "USER", "ASSISTANT", ":"]
# What further forms are answered with; the words of the published ones that a word-level tokenizer parts at.
ANSWERS = [
    "Safety", "Safe", "Unsafe", "Controversial", "Categories", "Violent", "Non", "Sexual", "PII", "Suicide", "Unethical", "Politically",
    "Copyright", "None", "Refusal", "Yes", "No", "1", "2", "3", "4", "5",
]  # fmt: skip
CHAT = "{{ bos_token }} {% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}verdict :"
PUBLISHED = list(CATEGORIES)
SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_tokenizer(folder: Path, chat: str | None, more: Sequence[str] = ()) -> int:
    """A word-level tokenizer that puts <s> first; returns its size."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS, *more])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(SPECIAL)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=chat, clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip
    return len(vocabulary)


def write_classifier(folder: Path, seed: int = 0, **changes: Any) -> Any:
    """A LlamaForSequenceClassification with the 14 published labels; returns it."""
    size = write_tokenizer(folder, None)
    labels = dict(enumerate(PUBLISHED))
    config = tf.LlamaConfig(
        **SHAPE | {"vocab_size": size, "id2label": labels, "problem_type": "multi_label_classification"} | changes
    )  # fmt: skip
    torch.manual_seed(seed)
    model = tf.LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        # The outputs agree by and large, so that some answers are above the threshold in none.
        model.score.weight.copy_(torch.randn(1, SHAPE["hidden_size"]) * 0.3)
        model.score.weight.add_(torch.randn_like(model.score.weight) * 0.05)
    model.save_pretrained(folder)
    return model


def write_guard(
    folder: Path, chat: str | None = CHAT, seed: int = 0, *, family: str = "Llama", more: Sequence[str] = (), **changes: Any
) -> Any:
    """A language model of a family of transformers'; returns it.

    Args:
        folder: of it and its tokenizer.
        chat: template of the tokenizer.
        seed: of the weights.
        family: "Llama", "Qwen3" or "Gemma".
        more: words of the tokenizer beside WORDS.
        changes: keys of the configuration.
    """
    size = write_tokenizer(folder, chat, more)
    torch.manual_seed(seed)
    config = getattr(tf, f"{family}Config")(**SHAPE | {"vocab_size": size} | changes)
    model = getattr(tf, f"{family}ForCausalLM")(config).eval()
    model.save_pretrained(folder)
    return model


def judge_config(name: str, folder: Path | str, **more: Any) -> Any:
    """The default configuration with this judge, in float32."""
    config = get_config()
    config.model.dtype = "float32"
    config.judge.update({"name": name, "path": str(folder), "batch_size": 4, **more})
    return config


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def texts(count: int, longest: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Prompts and answers of invented words, of mixed lengths; the second answer is empty."""
    generator = torch.Generator().manual_seed(seed)

    def text(most: int) -> str:
        n = int(torch.randint(1, most, (), generator=generator))
        return " ".join(f"w{int(i)}" for i in torch.randint(0, 60, (n,), generator=generator))

    answers = [text(longest) for _ in range(count)]
    return [text(12) for _ in range(count)], [answers[0], "", *answers[2:]]
