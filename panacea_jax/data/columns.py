"""What the columns of each task mean: one reader a task, from a row to the parts of a record.

Column names are those of the sets on the Hugging Face hub; instructions, label names and the GSM8K
ending are those of the published pipelines (methods.md §14), so that results can be compared.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from panacea_jax.data import categories
from panacea_jax.data.chat import Turn, read_chat, valid_unicode
from panacea_jax.data.fields import named_fields, names_beyond
from panacea_jax.errors import InputError

SST2_INSTRUCTION = "Analyze the sentiment of the input, and respond only positive or negative"
SST2_LABELS = ("negative", "positive")
AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
AG_NEWS_INSTRUCTION = (
    "Categorize the news article given in the input into one of the 4 categories:\n\n"
    "World\nSports\nBusiness\nSci/Tech\n"
)
GSM8K_ENDING = "The final answer is: "
# Between the context of a HarmBench behaviour and the behaviour, in what its models are asked (its method "DirectRequest").
CONTEXT_RULE = "\n\n---\n\n"
# What the sets of harmful prompts call a prompt, a category and a context. JailbreakBench's Behavior is the name of its Goal.
_ASKED = ("forbidden_prompt", "Goal", "goal", "Behavior", "turns", "prompt", "instruction", "question")
_HARMS = ("category", "Category", "SemanticCategory", "type")
_CONTEXTS = ("ContextString", "context")

_Row = Mapping[str, Any]


class Fields(NamedTuple):
    """A row as read: the four parts of a record, the columns they came from, the columns whose form
    differs from file to file, in one form, and the turns before the answer where there are several."""

    instruction: str
    input: str
    output: str
    reference: str
    used: tuple[str, ...]
    normalised: Mapping[str, Any] = {}
    turns: tuple[Turn, ...] = ()


def read_columns(task: str, row: _Row, need_output: bool, layout: str = "") -> Fields:
    """Read one row; InputError names the field that is missing or of the wrong type.

    With `need_output`, a prompt without an answer column is refused; an answer that is there but
    empty is the user's choice. `layout` is of conversations: see `chat.read_chat`.
    """
    if task == "chat":
        return _chat(row, need_output, layout)
    fields = READERS[task](row)
    if need_output and task in _ANSWER_OF_PROMPTS:
        column = _ANSWER_OF_PROMPTS[task]
        if column is None:
            raise InputError(f"{task} holds prompts only, so it cannot be trained on")
        if row.get(column) is None:
            raise InputError(f"no field {column!r}, which training on {task} needs")
    return fields


def is_safe(extra: _Row, default: bool) -> bool:
    """The `is_safe` column of BeaverTails, also as CSV writes it; `default` where it is absent."""
    value = extra.get("is_safe")
    if value is None:
        return default
    return value.strip().lower() in ("true", "1") if isinstance(value, str) else bool(value)


def _missing(row: _Row, name: str) -> InputError:
    has = f"(it has: {named_fields(row)}); config.data.columns=OURS=THEIRS maps other names"
    return InputError(f"no field {name!r} {has}", record=names_beyond(row))


def _text(row: _Row, name: str) -> str:
    """A required text column."""
    value = row.get(name)
    if name not in row:
        raise _missing(row, name)
    if not isinstance(value, str):
        what = "null" if value is None else type(value).__name__
        raise InputError(f"field {name!r} must be text, not {what}")
    return valid_unicode(value, f"field {name!r}")


def _optional(row: _Row, name: str) -> str:
    return "" if row.get(name) is None else _text(row, name)


def read_label(row: _Row, names: tuple[str, ...]) -> str:
    """The name of a class label, given as that or as its number (CSV holds that as digits).

    Raises:
        InputError: No field `label`, or neither.
    """
    value = row.get("label")
    if value is None:
        raise _missing(row, "label")
    if isinstance(value, str) and value in names:
        return value
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(names):
        return names[number]
    known = ", ".join(f"{number} {name}" for number, name in enumerate(names))
    raise InputError(f"field 'label' is none that is known: {known}", record=value)


def _gsm8k(row: _Row) -> Fields:
    question, answer = _text(row, "question"), _text(row, "answer")
    _, mark, number = answer.rpartition("####")
    if not mark or not number.strip():
        raise InputError("field 'answer' does not end in '#### NUMBER'")
    # The published pipelines replace the mark alone, which leaves two spaces before the number.
    output = answer.replace("####", GSM8K_ENDING)
    reference = number.strip().replace(",", "")
    return Fields(question, "", output, reference, ("question", "answer"))


def _sst2(row: _Row) -> Fields:
    sentence, name = _text(row, "sentence"), read_label(row, SST2_LABELS)
    return Fields(SST2_INSTRUCTION, sentence, name, name, ("sentence", "label"))


def _ag_news(row: _Row) -> Fields:
    text, name = _text(row, "text"), read_label(row, AG_NEWS_LABELS)
    return Fields(AG_NEWS_INSTRUCTION, text, name, name, ("text", "label"))


def _pairs(row: _Row) -> Fields:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    used = ("instruction", "input", "output")
    return Fields(instruction, _optional(row, "input"), output, output, used)


def _alpaca_eval(row: _Row) -> Fields:
    # The hub calls the reference answer `output`; copies of the evaluation set rename it.
    renamed = row.get("output") is None and row.get("reference_output") is not None
    name = "reference_output" if renamed else "output"
    output = _text(row, name)
    return Fields(_text(row, "instruction"), "", output, output, ("instruction", name))


def _refusals(row: _Row) -> Fields:
    """Instruction and output, or RepNoise's file where `refusal` is "Question: …\\nAnswer: …"."""
    if row.get("refusal") is None or row.get("instruction") is not None:
        return _pairs(row)
    question, mark, answer = _text(row, "refusal").partition("\nAnswer: ")
    if not mark:
        raise InputError("field 'refusal' is not of the form 'Question: …', newline, 'Answer: …'")
    return Fields(question.removeprefix("Question: "), "", answer, answer, ("refusal",))


def _beavertails(row: _Row) -> Fields:
    # A response here is what the model shall not say: there is nothing to compare an answer with.
    harms = {"category": categories.normalise(row["category"])} if "category" in row else {}
    prompt, response = _text(row, "prompt"), _optional(row, "response")
    return Fields(prompt, "", response, "", ("prompt", "response"), harms)


def _chat(row: _Row, need_output: bool = False, layout: str = "") -> Fields:
    chat = read_chat(row, need_output, layout)
    asked = next(turn.content for turn in reversed(chat.turns) if turn.role == "user")
    # One turn of the user is an instruction like any other's.
    turns = chat.turns if len(chat.turns) > 1 else ()
    answer = chat.answer or ""
    return Fields(asked, "", answer, answer, chat.used, turns=turns)


def _xstest(row: _Row) -> Fields:
    return Fields(_text(row, "prompt"), "", "", "", ("prompt",))


def _harmful(row: _Row) -> Fields:
    """A prompt of any of the published sets, told by its columns; SORRY-Bench has it as a list of one turn."""
    name = next((n for n in _ASKED if row.get(n) is not None), None) or next((n for n in _ASKED if n in row), "prompt")
    turns = row.get(name) if name == "turns" else None
    if isinstance(turns, list | tuple) and len(turns) != 1:
        raise InputError(f"field 'turns' must hold one text, not {len(turns)}")
    prompt = _text({name: turns[0]} if isinstance(turns, list | tuple) else row, name)
    context = next((_text(row, n) for n in _CONTEXTS if row.get(n)), "")
    harm = next((row[n] for n in _HARMS if row.get(n) is not None), None)
    # Numbers are names here: SORRY-Bench's categories are counted, from another list in each version.
    harms = categories.normalise(str(harm) if isinstance(harm, int) and not isinstance(harm, bool) else harm)
    return Fields(CONTEXT_RULE.join(filter(None, (context, prompt))), "", "", "", (name,), {"category": harms} if harms else {})


def _advbench(row: _Row) -> Fields:
    return Fields(_text(row, "goal"), "", _optional(row, "target"), "", ("goal", "target"))


READERS: dict[str, Callable[[_Row], Fields]] = {
    "gsm8k": _gsm8k,
    "sst2": _sst2,
    "ag_news": _ag_news,
    "alpaca": _pairs,
    "alpaca_eval": _alpaca_eval,
    "beavertails": _beavertails,
    "refusals": _refusals,
    "xstest": _xstest,
    "advbench": _advbench,
    "harmful": _harmful,
    "or_bench": _harmful,
    "chat": _chat,
    "pairs": _pairs,
}

# Tasks whose records may be prompts alone, and the column that training needs (None: has none).
_ANSWER_OF_PROMPTS = {
    "beavertails": "response", "advbench": "target", "xstest": None, "harmful": None, "or_bench": None,
}  # fmt: skip
