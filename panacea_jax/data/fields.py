"""How messages name the fields of a user's record: by names that are known here; others are the user's own words and only counted."""

from collections.abc import Collection, Iterable

# Columns of the sets and of the chat layouts that are read, and what usually stands beside them.
FIELDS = frozenset({
    "Behavior", "BehaviorID", "Category", "ContextString", "Goal", "SemanticCategory", "forbidden_prompt", "prompt_style", "turns",
    "answer", "category", "chosen", "completion", "content", "conversations", "from", "generator", "goal", "id", "idx", "input",
    "instruction", "is_safe", "label", "messages", "output", "prompt", "question", "reference", "reference_output", "refusal", "rejected",
    "response", "role", "sentence", "target", "text", "type", "value",
})  # fmt: skip


def named_fields(names: Iterable[object], known: Collection[str] = FIELDS, between: str = ", ") -> str:
    """ "instruction, text and 2 others", or "nothing"."""
    names = list(names)
    ours = [str(name) for name in names if name in known]
    other = len(names) - len(ours)
    counted = [f"{other} other{'s' if other > 1 else ''}"] if other else []
    return " and ".join(filter(None, [between.join(ours), *counted])) or "nothing"


def names_beyond(names: Iterable[object], known: Collection[str] = FIELDS) -> str | None:
    """Those that only count there, as the record of an error; None where there is none."""
    return ", ".join(str(name) for name in names if name not in known) or None
