"""Texts of models and records as a terminal may show them: all that is in them is seen, and none of it acts.

Such a text may hold control sequences that clear the screen or rename its window, marks that turn the direction of what follows, and
characters that nobody sees. Rich's own markup and emoji codes are no matter of characters: print ``rich.text.Text``, never a ``str``.
"""

import unicodedata

# They act on their neighbours alone, and Persian, Hindi and emoji are not read right without them.
_JOINERS = "\u200c\u200d"


def safe_text(text: str) -> str:
    """The text with every character that acts, or that nobody sees, spelt out: ``\\x1b``, ``\\u202e``. Line breaks stay."""
    return "".join(map(_shown, text.replace("\r\n", "\n").expandtabs(4)))


def safe_line(text: str, most: int = 0) -> str:
    """Likewise in one line, white space as single blanks, of at most ``most`` characters (0: all); one that is cut ends in "…"."""
    line = safe_text(" ".join(text.split()))
    return line if not most or len(line) <= most else f"{line[: most - 1]}…"


def _shown(character: str) -> str:
    if character.isprintable() or character == "\n" or character in _JOINERS:
        return character
    if unicodedata.category(character) == "Zs":
        return " "
    return character.encode("unicode_escape").decode("ascii")
