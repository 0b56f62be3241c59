"""Control tokens that a text from outside spells out, kept as the text they are.

A tokenizer reads ``<|im_end|>`` in a record as the end of the turn that the record stands in. Here the user may be the attacker, so such
a text is marked before it is put into a template, and tokenised in pieces between the template's own control tokens.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

from panacea_jax.errors import InputError

# A control token that is text is this noncharacter and a private one with the token's number. The noncharacter itself is marked likewise.
_MARK, _FIRST = "\ufdd0", 0xF0000


class SpecialTokens:
    """Marks control tokens in texts, and tokenises texts with marks.

    Attributes:
        tokenizer: a transformers tokenizer.
        own: a pattern of its control tokens, of two the longer one.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Look at the tokenizer's control tokens."""
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values() if tokenizer is not None else ()
        names = sorted({token.content for token in added if token.special}, key=len, reverse=True)
        self._marked = [_MARK, *names]
        self.own = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._spelt_out = re.compile("|".join(map(re.escape, self._marked)))

    def mark(self, text: str) -> str:
        """The text with its control tokens marked."""
        return self._spelt_out.sub(lambda found: _MARK + chr(_FIRST + self._marked.index(found.group())), text)

    def plain(self, text: str) -> str:
        """A marked text as people read it."""
        return re.sub(f"{_MARK}(.)", lambda found: self._marked[ord(found[1]) - _FIRST], text)

    def ends(self, text: str) -> bool:
        """Whether a marked text ends in a control token, but for white space."""
        text = text.rstrip()
        return any(text.endswith(token) for token in self._marked[1:])

    def ids(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Ids of marked texts. Nothing is cut: truncation inside a fast tokenizer is shared state, on which threads would race.

        Args:
            texts: with control tokens of their own, and marked ones.
            add_special_tokens: the tokenizer puts first what it does put first.

        Raises:
            InputError: a marked control token is no text to this tokenizer.
        """
        ordinary = [text for text in texts if _MARK not in text]
        found = iter(self._tokenise(ordinary, add_special_tokens=add_special_tokens) if ordinary else ())
        return [self._in_pieces(text, add_special_tokens) if _MARK in text else next(found) for text in texts]

    def _tokenise(self, texts: Sequence[str], **settings: Any) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), verbose=False, **settings).input_ids
        return ids

    def _in_pieces(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = list(self.tokenizer("", add_special_tokens=True).input_ids) if add_special_tokens else []
        end = 0
        for found in [*self.own.finditer(text), None]:
            piece = self.plain(text[end : found.start() if found else len(text)])
            if piece:
                ids += self._piece(piece, first=not end)
            if found:
                ids.append(int(self.tokenizer.convert_tokens_to_ids(found.group())))
                end = found.end()
        return ids

    def _piece(self, piece: str, first: bool) -> list[int]:
        # Some tokenizers put a blank before a text that stands first; a newline takes it instead.
        lead = "" if first or self._stands_alone else "\n"
        texts = [lead + piece, lead] if lead else [piece]
        ids, *skipped = self._tokenise(texts, add_special_tokens=False, split_special_tokens=True)
        ids = ids[len(skipped[0]) :] if skipped else ids
        if wrong := self._control.intersection(ids):
            token = self.tokenizer.convert_ids_to_tokens(min(wrong))
            raise InputError(
                f"its text holds {token!r}, a control token that this tokenizer cannot write as text; take it out, or set "
                "config.data.special_tokens=as_is"
            )
        return ids

    @functools.cached_property
    def _control(self) -> set[int]:
        """Ids that no text may have; that of an unknown word is none."""
        return {int(i) for i in self.tokenizer.convert_tokens_to_ids(self._marked[1:])} - {self.tokenizer.unk_token_id}

    @functools.cached_property
    def _stands_alone(self) -> bool:
        """Whether a piece has the same ids by itself as after a control token."""
        [alone, after] = self._tokenise(["a", self.tokenizer.eos_token + "a"], add_special_tokens=False)
        return after[1:] == alone
