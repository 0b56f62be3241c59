"""Records as token ids, exactly as the published pipelines make them (methods.md §14).

The prompt and the whole text are tokenised separately, because a merge across the boundary must count as it does there; likewise the
text up to each further end of an answer. All is cut on the right at `max_length`; only the tokens of answers carry loss.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int32

from panacea_jax.data.sources import Record
from panacea_jax.data.template import Template
from panacea_jax.errors import InputError

_log = logging.getLogger(__name__)

# Of a pasted book only the beginning is tokenised: at first so many characters for each token that a record may have.
CHARACTERS = 64


@dataclass(frozen=True, eq=False)
class Example:
    """One record to train on.

    Attributes:
        tokens: ids of the text.
        loss_mask: the tokens to learn from: answers, and the marks of their ends.
        cut: the text went on behind the last of them.
        entering: what enters the lowest adapted layer at each token, where it was computed.
        number: its place in its set, from 0, where a method asks for it.
    """

    tokens: Int32[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"]
    cut: bool = False
    entering: Float[np.ndarray, "n D"] | None = None
    number: int | None = None

    @classmethod
    def answering(cls, tokens: Int32[np.ndarray, " n"], prompt_length: int) -> "Example":
        """One answer that follows a prompt of so many tokens."""
        return cls(tokens, np.arange(len(tokens)) >= prompt_length)

    @property
    def has_target(self) -> bool:
        """Whether any token is left to learn from."""
        return bool(self.loss_mask.any())


def encode(record: Record, template: Template, max_length: int, loss_on: str = "all") -> Example:
    """Tokenise one record to train on; n ≤ `max_length`, and perhaps no target token is left.

    Raises:
        InputError: the template has no form for it.
    """
    text, answers = template.conversation(record, loss_on)
    ends = [end for answer in answers for end in answer]
    most = CHARACTERS * max_length
    while True:
        *parts, ids = template.ids([text[: min(end, most)] for end in (*ends[:-1], len(text))])
        # Well beyond the limit, what was left out has no part in the tokens that count.
        if most >= len(text) or len(ids) > 2 * max_length:
            break
        most *= 2
    # The last answer ends the text, so its end need not be looked for.
    places = [*map(len, parts), len(ids)]
    mask = np.zeros(len(ids), np.bool_)
    for start, end in zip(places[::2], places[1::2]):
        mask[start:end] = True
    tokens = np.asarray(ids[:max_length], np.int32)
    return Example(tokens, mask[:max_length], cut=len(ids) > max_length)


def encode_prompt(record: Record, template: Template) -> list[int]:
    """Tokenise a prompt to answer, with the ids of its prompt in training; it is not cut."""
    [ids] = template.ids([template.prompt(record)])
    return ids


def encode_prompts(records: Sequence[Record], template: Template, max_length: int, key: str) -> list[Example]:
    """Tokenise prompts alone: nothing of them is learnt, and none is cut.

    Raises:
        InputError: the template has no form for a record, or its prompt is longer than `max_length`; by its number.
    """
    examples = []
    for number, record in enumerate(records, start=1):
        try:
            ids = encode_prompt(record, template)
        except InputError as error:
            raise InputError(f"{key}: record {number}: {error}") from error
        if len(ids) > max_length:
            raise InputError(f"{key}: record {number}: its prompt has {len(ids)} tokens, more than config.data.max_length={max_length}")
        examples.append(Example(np.asarray(ids, np.int32), np.zeros(len(ids), np.bool_)))
    return examples


def encode_all(
    records: Sequence[Record], template: Template, max_length: int, key: str, *, loss_on: str = "all", max_cut: float = 1.0
) -> list[Example]:  # fmt: skip
    """Tokenise a stream. Records without a target token keep their place and carry no loss.

    Args:
        records: In the stream's order, which is kept so that step t sees the same rows as others'.
        template: How they become text.
        max_length: Tokens a record may have.
        key: Configuration key of the source, for messages.
        loss_on: Which answers of a conversation to learn from, "all" or the "last".
        max_cut: Share of the answers that may be cut.

    Raises:
        InputError: A record that the template has no form for, by its number; no record at all has a target token; too many are cut.
    """
    examples = []
    for number, record in enumerate(records, start=1):
        try:
            examples.append(encode(record, template, max_length, loss_on))
        except InputError as error:
            raise InputError(f"{key}: record {number}: {error}") from error
    n, limit = len(examples), f"config.data.max_length={max_length}"
    empty = sum(not example.has_target for example in examples)
    if empty == n:
        raise InputError(f"{key}: no target token is left in any of the {empty} records: every prompt fills {limit}")
    if empty:
        _log.warning("%s: %d of %d records have a prompt that fills %s; they stay in the order and carry no loss", key, empty, n, limit)
    cut = sum(example.cut for example in examples)
    if cut > max_cut * n:
        raise InputError(f"{key}: {cut} of {n} answers are cut at {limit}, more than config.data.max_cut={max_cut:g} allows")
    if cut:
        _log.warning("%s: %d of %d answers are cut at %s", key, cut, n, limit)
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
