"""The tokenizer that a GGUF file describes, as a ``tokenizer.json`` and its configuration.

The file lists tokens, their kinds, and merges or scores; how text is split before merging it gives as
a name only (``tokenizer.ggml.pre``). Names that are not in the table below are refused: another split
gives other ids without a word.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from panacea_jax.errors import InputError
from panacea_jax.models.gguf_metadata import Metadata

# llama.cpp's kinds of tokens.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
SPACE = "▁"


class Split(NamedTuple):
    """How a byte-level vocabulary's text is split.

    Attributes:
        before: pre-tokenizers in front of the byte level.
        gpt2: whether the byte level then splits as GPT-2 does.
        normalizer: of the text, or None.
        whole: a piece that is a token is not merged anew.
        begins: whether texts begin with BOS where the file does not say.
    """

    before: Sequence[Any] = ()
    gpt2: bool = False
    normalizer: Any = None
    whole: bool = False
    begins: bool = False


def _by_pattern(digits: str) -> list[Any]:
    """Contractions, words with one character before them, numbers, signs, ends of lines, space."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip
    return [pre_tokenizers.Split(Regex(pattern), "isolated")]


_LLAMA3 = Split(_by_pattern(r"\p{N}{1,3}"), whole=True, begins=True)
_QWEN2 = Split(_by_pattern(r"\p{N}"), normalizer=normalizers.NFC())
SPLITS = {
    "gpt-2": Split(gpt2=True),
    "smollm": Split([pre_tokenizers.Digits(individual_digits=True)], gpt2=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def make_tokenizer(meta: Metadata) -> Any:
    """A transformers tokenizer that makes the ids of the file.

    Raises:
        InputError: the file has no tokenizer, or one that is not understood here.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = meta.value("tokenizer.ggml.tokens")
    kind = meta.value("tokenizer.ggml.model")
    if not tokens or kind not in BUILDERS:
        raise InputError(
            f"{meta.file}: tokenizer.ggml.model {kind}: not supported; known: {', '.join(BUILDERS)}"
        )
    core, begins = BUILDERS[kind](meta, tokens)
    kinds = meta.value("tokenizer.ggml.token_type") or [1] * len(tokens)
    known = core.get_vocab(with_added_tokens=False)
    for token, which in zip(tokens, kinds):
        if token in known and which in (CONTROL, USER_DEFINED):
            add = core.add_special_tokens if which == CONTROL else core.add_tokens
            add([AddedToken(token, normalized=False, special=which == CONTROL)])
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {
        ours: tokens[i] for name, ours in names.items() if (i := meta.token_id(name)) is not None
    }
    said = meta.value("tokenizer.ggml.add_bos_token")
    if (begins if said is None else said) and "bos_token" in special:
        bos = special["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"],
            special_tokens=[(bos, core.token_to_id(bos))],
        )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=meta.value("tokenizer.chat_template"),
        model_max_length=meta.integer("context_length"), clean_up_tokenization_spaces=False, **special,
    )  # fmt: skip


def _vocabulary(meta: Metadata, tokens: Sequence[str]) -> dict[str, int]:
    found = {token: i for i, token in enumerate(tokens)}
    if len(found) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if found[token] != i)
        raise InputError(f"{meta.file}: tokenizer.ggml.tokens: {twice!r} is there twice")
    return found


def _byte_level(meta: Metadata, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """BPE over bytes."""
    name = meta.value("tokenizer.ggml.pre")
    if name not in SPLITS:
        raise InputError(
            f"{meta.file}: tokenizer.ggml.pre {name}: how text is split is not known; known: {', '.join(SPLITS)}"
        )
    split = SPLITS[name]
    vocabulary = _vocabulary(meta, tokens)
    merges = [tuple(m.split(" ", 1)) for m in meta.value("tokenizer.ggml.merges") or ()]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise InputError(f"{meta.file}: tokenizer.ggml.merges: {' '.join(merge)!r:.80}: not two tokens of the file that make a third")
    core = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.whole))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.gpt2)
    core.pre_tokenizer = pre_tokenizers.Sequence([*split.before, bytes_])
    if split.normalizer is not None:
        core.normalizer = split.normalizer
    core.decoder = decoders.ByteLevel()
    return core, split.begins


def _sentencepiece(meta: Metadata, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """BPE over characters, with bytes for what it lacks; merges follow from the tokens' scores."""
    gemma = meta.architecture.startswith("gemma")
    # Tokens of spaces alone are written with real spaces.
    spelled = [SPACE * len(t) if t and not t.strip(" ") else t for t in tokens]
    vocabulary = _vocabulary(meta, spelled)
    scores = meta.value("tokenizer.ggml.scores")
    if scores is None:
        raise InputError(f"{meta.file}: tokenizer.ggml.scores is missing")
    # Gemma's scores do not follow the order of its merges; its ids do.
    rank = [-float(s) for s in scores] if not gemma else [float(i) for i in range(len(tokens))]
    unknown = meta.token_id("unknown")
    core = Tokenizer(
        models.BPE(
            vocabulary, _merges(vocabulary, rank), fuse_unk=True, byte_fallback=True,
            unk_token=None if unknown is None else tokens[unknown],
        )
    )  # fmt: skip
    prefix = meta.value("tokenizer.ggml.add_space_prefix")
    prefix = not gemma if prefix is None else bool(prefix)
    spaces = normalizers.Replace(" ", SPACE)
    core.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    )
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    return core, True


def _merges(vocabulary: dict[str, int], rank: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best token first."""
    found = [
        (rank[i], vocabulary[token[:cut]], vocabulary[token[cut:]])
        for token, i in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    by_id = list(vocabulary)
    return [(by_id[left], by_id[right]) for _, left, right in sorted(found)]


BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
