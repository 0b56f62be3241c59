"""Shared inputs: the real data beside the repository, where there is any, and a small tokenizer."""

import json
from pathlib import Path

import pytest

from panacea_jax.data.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}<{{ turn['role'] }}> {{ turn['content'] }} <turn> "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = (
    "Below is an instruction that describes a task paired with an input that provides further "
    "context Write a response that appropriately completes the request Instruction Input Response "
    "how do I mend blorf take gandle and vix it no thanks # . , : ?"
)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "PROVENANCE.md").exists():
        pytest.skip(f"the real data is not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def llama2(shared: Path):
    return load_tokenizer(shared / "tokenizers" / "llama2")


def write_tokenizer(folder: Path, *, eos: bool = True, chat: str | None = CHAT_TEMPLATE) -> Path:
    """A word-level tokenizer folder made by the `tokenizers` library; it puts <s> first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<unk>", "<s>", "</s>", "<user>", "<assistant>", "<turn>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*special, *WORDS.split()]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "unk_token": "<unk>",
        **({"eos_token": "</s>"} if eos else {}),
        **({"chat_template": chat} if chat else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory):
    """The small tokenizer, with a chat template."""
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizers") / "words"))


@pytest.fixture(scope="session")
def plain_words(tmp_path_factory: pytest.TempPathFactory):
    """The small tokenizer without a chat template."""
    folder = tmp_path_factory.mktemp("tokenizers") / "plain"
    return load_tokenizer(write_tokenizer(folder, chat=None))


@pytest.fixture(scope="session")
def make_tokenizer():
    return write_tokenizer
