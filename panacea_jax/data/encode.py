"""Records as token ids, exactly as the published pipelines make them (methods.md §14).

The prompt and the whole text (prompt + output + EOS) are tokenised separately, because a merge
across the boundary must count as it does there; both are cut on the right at `max_length`; the
first len(prompt) tokens carry no loss.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from panacea_jax.data.sources import Record
from panacea_jax.data.template import render
from panacea_jax.errors import InputError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Example:
    """Token ids [n] of prompt, output and EOS; the first `prompt_length` of them carry no loss."""

    tokens: Int32[np.ndarray, " n"]
    prompt_length: int

    @property
    def has_target(self) -> bool:
        """Whether any token is left to learn from."""
        return self.prompt_length < len(self.tokens)


def encode(record: Record, tokenizer: Any, template: str, max_length: int) -> Example:
    """Tokenise one record to train on; n ≤ `max_length`, and perhaps no target token is left."""
    prompt = render(record, template, tokenizer)
    whole = prompt + record.output + tokenizer.eos_token
    prompt_ids, ids = _ids([prompt, whole], tokenizer, template)
    tokens = np.asarray(ids[:max_length], np.int32)
    return Example(tokens, min(len(prompt_ids), len(tokens)))


def encode_prompt(
    record: Record, tokenizer: Any, template: str, max_length: int | None = None
) -> list[int]:
    """Tokenise a prompt to answer, with the ids of its prompt in training.

    It is not cut unless `max_length` is given.
    """
    [ids] = _ids([render(record, template, tokenizer)], tokenizer, template)
    return ids[:max_length]


def encode_all(
    records: Sequence[Record], tokenizer: Any, template: str, max_length: int, key: str
) -> list[Example]:
    """Tokenise a stream. Records without a target token keep their place and carry no loss.

    Args:
        records: In the stream's order, which is kept so that step t sees the same rows as others'.
        tokenizer: A transformers tokenizer.
        template: "alpaca" or "chat".
        max_length: Tokens a record may have.
        key: Configuration key of the source, for messages.

    Raises:
        InputError: No record at all has a target token.
    """
    examples = [encode(record, tokenizer, template, max_length) for record in records]
    empty = sum(not example.has_target for example in examples)
    if empty == len(examples):
        raise InputError(
            f"{key}: no target token is left in any of the {empty} records: every prompt fills "
            f"config.data.max_length={max_length}"
        )
    if empty:
        _log.warning(
            "%s: %d of %d records have a prompt that fills config.data.max_length=%d; "
            "they stay in the order and carry no loss",
            *(key, empty, len(examples), max_length),
        )
    return examples


def check_ids(rows: Iterable[Sequence[int] | np.ndarray], vocab_size: int, where: str) -> None:
    """Refuse ids that the model has no row of its embedding for: a lookup there yields NaN without a word.

    Tokens that were added to a tokenizer, and not to the model, have such ids.

    Args:
        rows: Token ids of each record, in order.
        vocab_size: Rows of the embedding.
        where: Key of what the records come from, for messages.

    Raises:
        InputError: Names the first such record, counted from 1, and its id.
    """
    for number, row in enumerate(rows, start=1):
        ids = np.asarray(row)
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise InputError(
                f"{where}: record {number} has token id {wrong}, outside the model's vocabulary of "
                f"{vocab_size}; use the model's own tokenizer, or resize the model's embedding"
            )


def _ids(texts: list[str], tokenizer: Any, template: str) -> list[list[int]]:
    # A chat template writes BOS itself; the Alpaca text leaves it to the tokenizer. Callers cut:
    # truncation inside a fast tokenizer is shared state, on which threads would race.
    special = template == "alpaca"
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False).input_ids
    return ids
