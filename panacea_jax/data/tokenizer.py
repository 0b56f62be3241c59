"""Tokenizers through transformers, without the sentencepiece trap and without remote code."""

import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from panacea_jax.data import files
from panacea_jax.errors import InputError
from panacea_jax.untrusted import MIB, reason

_log = logging.getLogger(__name__)

# What belongs to a tokenizer, and bytes that none of it exceeds: Gemma 3 has 32 MiB.
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "added_tokens.json")
LARGEST = 256 * MIB
# What ways to split text differ in: capitals, a number, several spaces, contractions, signs, accents, ends of lines.
PROBE = "Two  words at the Mill's, 12 loaves:\n\ndéjà vu (3.50)   I'm done"


def load_tokenizer(folder: str | Path, key: str = "config.model.path") -> Any:
    """Load the tokenizer of a Hugging Face folder, or of a hub id ``owner/name``.

    transformers 5, given a sentencepiece ``tokenizer.model`` alone, silently yields other ids than
    sentencepiece does (no BOS, other merges), so such a folder is refused. So is one whose class
    loses text that its ``tokenizer.json`` keeps; where it only splits text in a way of its own, a
    warning says so. The network is used only for a hub id.

    Raises:
        InputError: No such folder, no usable tokenizer in it, no end-of-sequence token, a
            tokenizer that appends that token by itself (a prompt would then end in it), or one that
            loses text.
    """
    path = _folder(str(folder), key)
    if path is not None:
        _refuse_model_alone(path, key)
        _refuse_strange_files(path, key)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder if path is None else path),
            local_files_only=path is not None,
            trust_remote_code=False,
        )
        appended = tokenizer("a").input_ids[-1:]
    except Exception as error:  # damaged JSON, missing files, offline, unknown class, settings of other types
        why = reason(error)
        raise InputError(f"{key}: {folder}: no usable tokenizer ({why})") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{key}: {folder}: the tokenizer names no end-of-sequence token")
    if appended == [tokenizer.eos_token_id]:
        raise InputError(f"{key}: {folder}: the tokenizer appends EOS; set add_eos_token to false")
    if path is not None:
        _compare_ids(tokenizer, path, key)
    return tokenizer


def _compare_ids(tokenizer: Any, folder: Path, key: str) -> None:
    """Hold a class against the folder's ``tokenizer.json``, which is what the model was trained with."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    try:
        core = Tokenizer.from_file(str(file))
        core.no_padding()
        core.no_truncation()
        wanted = core.encode(PROBE, add_special_tokens=False).ids
        found = tokenizer(PROBE, add_special_tokens=False, verbose=False).input_ids
    except Exception as error:  # the tokenizers package raises nothing more exact
        raise InputError(f"{key}: {file}: no usable tokenizer ({reason(error)})") from error
    if found == wanted:
        return
    problem = (
        f"{key}: {folder}: {type(tokenizer).__name__}, which transformers takes for this folder, makes other ids than tokenizer.json"
    )
    if tokenizer.decode(found, clean_up_tokenization_spaces=False) != core.decode(
        wanted, skip_special_tokens=False
    ):
        raise InputError(f"{problem} and loses text; set tokenizer_class in tokenizer_config.json")
    _log.warning("%s (the same text, split in another way)", problem)


def _folder(where: str, key: str) -> Path | None:
    try:
        path = files.local(where)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    if path is None and (where.count("/") != 1 or ":" in where):
        raise InputError(f"{key}: {where}: neither a folder nor a hub id owner/name")
    if path is not None and not path.is_dir():
        raise InputError(f"{key}: {where}: not a folder")
    return path


def _refuse_strange_files(folder: Path, key: str) -> None:
    """On a pipe the tokenizer's own reader would wait for ever, and of a huge file it makes more than the memory holds."""
    for file in sorted(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        if not file.is_file():
            raise InputError(f"{key}: {file}: not a regular file")
        if file.stat().st_size > LARGEST:
            raise InputError(f"{key}: {file}: has more than {LARGEST // MIB} MiB, which no tokenizer has")


def _refuse_model_alone(folder: Path, key: str) -> None:
    usable = ("tokenizer.json", "vocab.json")
    if any((folder / name).exists() for name in usable):
        return
    models = sorted(folder.glob("*.model"))
    if models:
        raise InputError(
            f"{key}: {models[0]} alone gives wrong ids under transformers 5; add a tokenizer.json "
            "(save_pretrained of the fast tokenizer under transformers 4 writes one)"
        )
    raise InputError(f"{key}: {folder}: no tokenizer.json")
