"""A model's tokenizer and its embedding together: which ids the one makes, and which the other has rows for."""

from pathlib import Path, PurePath
from typing import Any, NamedTuple

from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.errors import InputError
from panacea_jax.models.families import config_from_folder
from panacea_jax.models.hub import local_folder


class Vocabulary(NamedTuple):
    """What text becomes for a model.

    Attributes:
        folder: of the model.
        tokenizer: a transformers tokenizer.
        size: rows of the embedding; :func:`panacea_jax.data.encode.check_ids` refuses ids from there on.
    """

    folder: Path
    tokenizer: Any
    size: int


def open_vocabulary(
    where: str | PurePath, key: str = "config.model.path", *, classifier: bool = False
) -> Vocabulary:
    """The vocabulary of a Hugging Face folder or hub id.

    ``config.json`` is read first: the tokenizer, which cannot be made without it, would get the blame.

    Args:
        where: folder or hub id ``owner/name``.
        key: configuration key that names it, for messages.
        classifier: the folder holds a sequence classifier.

    Raises:
        InputError: there is no such folder, config.json or the tokenizer cannot be used, or the end
            token has no row in the embedding.
    """
    try:
        folder = local_folder(where)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    size = config_from_folder(folder, classifier=classifier).vocab_size
    tokenizer = load_tokenizer(folder, key)
    if tokenizer.eos_token_id >= size:
        raise InputError(
            f"{key}: {folder}: the tokenizer's end token {tokenizer.eos_token!r} has id "
            f"{tokenizer.eos_token_id}, outside the model's vocabulary of {size}"
        )
    return Vocabulary(folder, tokenizer, size)
