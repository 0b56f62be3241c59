"""Conversations as chat files hold them: three layouts, one list of turns.

``messages`` is a list of ``{"role", "content"}`` (OpenAI, TRL), ``conversations`` one of ``{"from", "value"}`` (ShareGPT), and
``prompt`` with ``completion`` is either two texts or two such lists.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from panacea_jax.data.fields import named_fields, names_beyond
from panacea_jax.errors import InputError
from panacea_jax.untrusted import TEXT

LAYOUTS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
}
# What the layouts call who speaks.
_ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip


class Turn(NamedTuple):
    """Who speaks (system, developer, user, assistant or tool), and what."""

    role: str
    content: str


class Chat(NamedTuple):
    """A row as read.

    Attributes:
        turns: those before the answer.
        answer: the last turn of the assistant, None where there is none after the last of the user. What follows it is left out:
            nothing is learnt from it, and it changes nothing before it.
        used: the columns that they came from.
    """

    turns: tuple[Turn, ...]
    answer: str | None
    used: tuple[str, ...]


def read_chat(row: Mapping[str, Any], need_answer: bool, layout: str = "") -> Chat:
    """Read the conversation of a row.

    Args:
        row: by column.
        need_answer: it is trained on, so it is cut after the last answer; otherwise a conversation that the user ends is a prompt.
        layout: a name of `LAYOUTS`; "": the first whose columns are there.

    Raises:
        InputError: no such columns, or turns that are none; names the column and the turn.
    """
    wanted = [layout] if layout else list(LAYOUTS)
    found = next((name for name in wanted if _holds(row, name, need_answer)), None)
    if found is None and "prompt_completion" in wanted and row.get("prompt") is not None:
        has = f"(it has: {named_fields(row)}); config.data.columns=completion=THEIRS maps another name"
        raise InputError(f"no 'completion' to its 'prompt', so it cannot be trained on {has}", record=names_beyond(row))
    if found is None:
        columns = ", or ".join(" and ".join(map(repr, LAYOUTS[name])) for name in wanted)
        has = f"(it has: {named_fields(row)}); config.data.columns=OURS=THEIRS maps other names"
        raise InputError(f"no conversation: it needs {columns} {has}", record=names_beyond(row))
    used = LAYOUTS[found]
    if found == "prompt_completion":
        turns = _side(row, "prompt", "user")
        if row.get("completion") is not None:
            turns += _side(row, "completion", "assistant")
    else:
        turns = _turns(row[used[0]], used[0])
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if need_answer and not answers:
        raise InputError(f"field {used[-1]!r}: nothing is answered in it, so it cannot be trained on")
    if answers and (need_answer or answers[-1] == len(turns) - 1):
        before, answer = turns[: answers[-1]], turns[answers[-1]].content
    else:
        before, answer = turns, None
    if not any(turn.role == "user" for turn in before):
        raise InputError(f"field {used[0]!r}: no turn of the user before the answer")
    return Chat(tuple(before), answer, used)


def _holds(row: Mapping[str, Any], layout: str, need_answer: bool) -> bool:
    first, *more = LAYOUTS[layout]
    return row.get(first) is not None and (not need_answer or all(name in row for name in more))


def _side(row: Mapping[str, Any], column: str, role: str) -> list[Turn]:
    """One of prompt and completion."""
    value = row[column]
    return [Turn(role, _content(value, f"field {column!r}"))] if isinstance(value, str) else _turns(value, column)


def _turns(value: Any, column: str) -> list[Turn]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InputError(f"field {column!r} must be a list of turns, not {type(value).__name__}", record=value)
    return [_turn(turn, f"field {column!r}, turn {number}") for number, turn in enumerate(value, 1)]


def _turn(turn: Any, place: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise InputError(f"{place}: expected an object with role and content", record=turn)
    key = "from" if "role" not in turn and "from" in turn else "role"
    if key not in turn:
        raise InputError(f"{place}: nobody is said to speak: no 'role' or 'from' (it has: {named_fields(turn)})", record=names_beyond(turn))
    role = turn[key]
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(f"{place}: {key!r} is none of {', '.join(_ROLES)}", record=role)
    said = "value" if "content" not in turn and "value" in turn else "content"
    if turn.get("tool_calls"):
        raise InputError(f"{place}: tool calls are not read; write them into {said!r} as text")
    if said not in turn:
        raise InputError(f"{place}: nothing is said: no 'content' or 'value' (it has: {named_fields(turn)})", record=names_beyond(turn))
    return Turn(_ROLES[role], _content(turn.get(said), f"{place}: {said!r}"))


def _content(value: Any, place: str) -> str:
    """A text, or a list of parts that are texts."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        parts = [part if isinstance(part, str) else _part(part, place) for part in value]
        value = "".join(parts)
    if not isinstance(value, str):
        raise InputError(f"{place} must be text or a list of text parts, not {type(value).__name__}", record=value)
    return valid_unicode(value, place)


def valid_unicode(text: str, place: str) -> str:
    """The text itself.

    Raises:
        InputError: it holds half a surrogate pair, as JSON can escape one, or is longer than any text.
    """
    if len(text) > TEXT:
        raise InputError(f"{place} has more than {TEXT} characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place} is not valid Unicode text") from error
    return text


def _part(part: Any, place: str) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InputError(f"{place} has a part that is no text; only text is read", record=kind)
    return str(part["text"])
