"""What of a model's text reaches a terminal."""

import unicodedata

import pytest

from panacea_jax.terminal import safe_line, safe_text

PLAIN = 'Łódź, 東京, नमस्ते, مرحبا, e\u0301, "[red]x[/red]" :smile: <b>λ‖ε‖</b> 🙂'


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07gone", r"\x1b[2J\x1b]0;title\x07gone"),
        ("\x9b31mred", r"\x9b31mred"),  # the same as ESC [, in one character
        ("good\rbad", r"good\rbad"),
        ("\u202eabc\u2066d\u200e", r"\u202eabc\u2066d\u200e"),  # bidirectional
        ("a\u200bb\ufeffc\u00add", r"a\u200bb\ufeffc\xadd"),  # nobody sees them
        ("\U000e0068\U000e0069", r"\U000e0068\U000e0069"),  # tags: a text within the text
        ("half \ud800", r"half \ud800"),
        ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
        ("a\r\nb\tc\u00a0d\u3000e", "a\nb   c d e"),
        ("می\u200cخواهم 👩\u200d🌾", "می\u200cخواهم 👩\u200d🌾"),  # wrong without them
        (PLAIN, PLAIN),
    ],
)
def test_what_acts_is_spelt_out(text, shown):
    assert safe_text(text) == shown


def test_of_all_characters_none_that_acts_is_left():
    """By their categories; what is left of "other" and "separator" are blank, line break and the two joiners."""
    everything = safe_text("".join(map(chr, range(0x110000))))
    left = {c for c in everything if unicodedata.category(c)[0] in "CZ"}
    assert left == {" ", "\n", "\u200c", "\u200d"}
    everything.encode("utf-8")  # no half of a surrogate pair


def test_one_line():
    assert safe_line(" a\n\n b\tc \u2028 d\x1b ") == r"a b c d\x1b"
    assert safe_line("abcdef", 6) == "abcdef" and safe_line("abcdefg", 6) == "abcde…"
    assert safe_line("\x1b" * 9, 6) == r"\x1b\…"
