"""The coherence rule behind HS+ (Panacea, Booster): an answer that stutters is no defence."""

from itertools import groupby

RUN = 4
"""A word this many times in a row makes an answer incoherent ("more than three times")."""


def incoherent(text: str) -> bool:
    """Whether one word occurs four or more times in a row.

    Every character that is not a letter (of any script) counts as a space and case is ignored, so
    neither punctuation nor digits break a run. Text without words, the empty text included, is
    coherent.
    """
    words = "".join(c if c.isalpha() else " " for c in text).lower().split()
    return any(sum(1 for _ in run) >= RUN for _, run in groupby(words))
