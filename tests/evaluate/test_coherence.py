"""The stutter rule of HS+, by hand-made texts."""

import pytest

from panacea_jax.evaluate.coherence import incoherent


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("blick blick blick", False),  # three in a row are allowed
        ("blick blick blick blick", True),
        ("well Blick, blick; BLICK... blick!", True),  # punctuation and case do not break a run
        ("blick 1 blick 2 blick 3 blick", True),  # nor do digits
        ("blick blick wug blick blick", False),
        ("blick blickblick blick blick", False),  # whole words only
        ("", False),
        ("7 7 7 7 7", False),  # no words at all
        ("don't don't don't don't", False),  # "don t don t …" alternates
        ("hé hé hé hé", True),  # letters of any script
        ("ha-ha-ha-ha", True),
        ("ha\nha\n\nha\tha", True),
    ],
)
def test_four_equal_words_in_a_row(text: str, expected: bool) -> None:
    assert incoherent(text) is expected
