"""From a record to text: ONE class for training, generation and judging.

A defence is measured on prompts of the form it was trained on, so nothing else builds a prompt. Text that a record brings never
becomes a control token, unless asked for (`special`).
"""

import datetime
import functools
import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from panacea_jax.data.sources import Record, Turn
from panacea_jax.data.special import SpecialTokens
from panacea_jax.errors import InputError

TEMPLATES = ("alpaca", "chat")
SPECIAL_TOKENS = ("text", "as_is")
LOSS_ON = ("all", "last")

# The public Alpaca text as the published pipelines use it: with the newline at its end (methods.md §14).
_TASK = "Below is an instruction that describes a task"
_CONTEXT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request.\n\n"

_KEY = "config.data.template"
# Characters of a turn from which on an error of a template that holds it is taken to quote it.
ECHO = 8
# How a template asks for the date.
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class Conversation(NamedTuple):
    """A text to train on, marked (see `Template.plain`), and where in it the answers begin and end, in characters."""

    text: str
    answers: tuple[tuple[int, int], ...]


class Template:
    """How records become text, and text becomes ids.

    Attributes:
        tokenizer: a transformers tokenizer; "alpaca" needs it for ids alone.
        id: names the exact form for manifests: "alpaca-1", or "chat-" and a hash of the chat template; after that the date, if the
            template writes one, and what differs from the default of the other arguments.
    """

    def __init__(
        self, name: str, tokenizer: Any, *, special_tokens: str = "text", thinking: bool = False, date: str = ""
    ) -> None:  # fmt: skip
        """Look at the template.

        Args:
            name: "alpaca", or "chat" for the tokenizer's own chat template.
            tokenizer: a transformers tokenizer.
            special_tokens: "text": control tokens that a record spells out are text; "as_is": they are control tokens.
            thinking: what templates of models that may think before they answer are told (``enable_thinking``).
            date: ISO date that a template which writes the date is given; "": today.

        Raises:
            InputError: unknown name, no chat template, or one whose date cannot be held fixed.
        """
        if name not in TEMPLATES:
            raise InputError(f"{_KEY}: unknown {name!r}; known: {' '.join(TEMPLATES)}")
        self.tokenizer = tokenizer
        self._alpaca, self._thinking = name == "alpaca", thinking
        self._special = SpecialTokens(tokenizer)
        self._as_text = special_tokens == "text"
        source = "" if self._alpaca else _chat_template(tokenizer)
        day = datetime.date.fromisoformat(date) if date else datetime.date.today()
        self._source = _CLOCK.sub(lambda found: repr(day.strftime(found[2])), source)
        if "strftime_now(" in self._source:
            raise InputError(f"{_KEY}: the chat template writes the date in a way that cannot be held to one day; use another template")
        self.id = "alpaca-1" if self._alpaca else "chat-" + hashlib.sha256(source.encode()).hexdigest()[:12]
        if self._source != source:
            self.id += f"-{day}"
        if thinking and "enable_thinking" in source:
            self.id += "-thinking"
        if not self._as_text:
            self.id += "-as_is"

    # ---- text

    def prompt(self, record: Record) -> str:
        """The prompt of a record, marked, up to where the answer starts.

        Raises:
            InputError: the chat template fails, or the record is a conversation that "alpaca" has no form for.
        """
        if self._alpaca:
            return self._alpaca_prompt(record)
        return self._chat(self._messages(record), open_answer=True)

    def conversation(self, record: Record, loss_on: str = "all") -> Conversation:
        """The whole text of a record to train on, and its answers: that of the last turn, or those of all.

        With "chat" an answer is what the template adds for it to the turns before, the mark of its end included, as
        ``{% generation %}`` marks it in templates that have such marks.

        Raises:
            InputError: as `prompt`; or a template under which it cannot be told where an answer begins and ends.
        """
        if self._alpaca:
            prompt = self._alpaca_prompt(record)
            text = prompt + self._marked(record.output) + self.tokenizer.eos_token
            return Conversation(text, ((len(prompt), len(text)),))
        turns = [*self._messages(record), Turn("assistant", self._marked(record.output))]
        text = self._chat(turns)
        last = len(turns) - 1
        chosen = [i for i, turn in enumerate(turns) if turn.role == "assistant" and (loss_on == "all" or i == last)]
        answers = tuple(self._answer(turns, i, text) for i in chosen)
        if not self._special.ends(text):
            text += self.tokenizer.eos_token
            answers = (*answers[:-1], (answers[-1][0], len(text)))
        return Conversation(text, answers)

    def plain(self, text: str) -> str:
        """A marked text as people read it."""
        return self._special.plain(text) if self._as_text else text

    def end_ids(self) -> list[int]:
        """Ids of the control token with which the template ends an answer; none where it has no such mark, or cannot be asked."""
        if self._alpaca:
            return []
        try:
            turns = [Turn("user", "a"), Turn("assistant", "b")]
            text = self._chat(turns)
            found = self._special.own.search(text, *self._answer(turns, 1, text))
        except InputError:
            return []
        return [] if found is None else [int(self.tokenizer.convert_tokens_to_ids(found.group()))]

    # ---- ids

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of marked texts, each a prompt or the beginning of a conversation. Nothing is cut.

        Raises:
            InputError: a control token that a record spells out is no text to this tokenizer.
        """
        # A chat template writes BOS itself; the Alpaca text leaves it to the tokenizer.
        if self._as_text:
            return self._special.ids(texts, add_special_tokens=self._alpaca)
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=self._alpaca, verbose=False).input_ids
        return ids

    # ---- parts

    def _marked(self, text: str) -> str:
        """A record's text, as the template gets it."""
        return self._special.mark(text) if self._as_text else text

    def _messages(self, record: Record) -> list[Turn]:
        """The turns before the answer, marked."""
        content = record.instruction + (f"\n\n{record.input}" if record.input else "")
        turns = record.turns or (Turn("user", content),)
        return [Turn(turn.role, self._marked(turn.content)) for turn in turns]

    def _alpaca_prompt(self, record: Record) -> str:
        if record.turns:
            roles = ", ".join(turn.role for turn in record.turns)
            raise InputError(
                f"{_KEY}: 'alpaca' is one instruction and its answer, but before the answer there are the turns {roles}; set "
                f"{_KEY}=chat"
            )
        opening = _TASK + (_CONTEXT if record.input else "") + _REQUEST
        given = f"### Input:\n{self._marked(record.input)}\n\n" if record.input else ""
        return f"{opening}### Instruction:\n{self._marked(record.instruction)}\n\n{given}### Response:\n"

    def _chat(self, turns: Sequence[Turn], open_answer: bool = False) -> str:
        messages = [{"role": t.role, "content": t.content if self._takes_text else _parts(t.content)} for t in turns]
        return self._render(messages, open_answer)

    def _render(self, messages: Sequence[dict[str, Any]], open_answer: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), chat_template=self._source, add_generation_prompt=open_answer, tokenize=False,
                enable_thinking=self._thinking,
            )  # fmt: skip
        except Exception as error:  # jinja has many errors, and a template may raise its own, with words of the record in it
            said = str(error)
            echoes = any(len(content) >= ECHO and content in said for content in (str(m["content"]) for m in messages))
            why = type(error).__name__ if echoes else said
            raise InputError(f"{_KEY}: the chat template failed ({why})", record=said if echoes else None) from error
        return str(text)

    @functools.cached_property
    def _takes_text(self) -> bool:
        """Whether a turn's content is a text, or a list of parts. Some templates leave the wrong one out without a word, so what
        comes back is looked at."""
        probe, problem = "blorf", "it leaves out what the turn says"
        for takes_text in (True, False):
            try:
                content = probe if takes_text else _parts(probe)
                if probe in self._render([{"role": "user", "content": content}], True):
                    return takes_text
            except InputError as error:
                problem = str(error)
        raise InputError(problem if problem.startswith(_KEY) else f"{_KEY}: the chat template failed ({problem})")

    def _answer(self, turns: Sequence[Turn], i: int, text: str) -> tuple[int, int]:
        """Where turn ``i``, an answer, begins and ends in the whole text.

        Raises:
            InputError: it cannot be told.
        """
        content = turns[i].content.strip()
        before = self._chat(turns[:i], open_answer=True)
        after = text if i == len(turns) - 1 else self._chat(turns[: i + 1])
        if text.startswith(after) and after.startswith(before):
            start, end = len(before), len(after)
            lead = text[start:end].partition(content)[0] if content else ""
            if not lead.strip() or self._thinking:
                return start, end
        # Templates that write a turn in another way once there are later ones (leaving out what was thought): here as there the
        # answer follows what both have in common, and ends in a control token.
        same = _common(before, text)
        start = text.rfind(content, 0, same + len(content)) if content else -1
        ended = self._special.own.match(text, start + len(content))
        if content and len(self._chat(turns[:i])) <= start <= same and ended:
            rest = text[ended.end() :]
            return start, ended.end() + len(rest) - len(rest.lstrip())
        raise InputError(
            f"{_KEY}: where the chat template {self.id} begins and ends an answer cannot be told, because it writes the turns before an "
            "answer otherwise once the answer is there"
        )


def _common(a: str, b: str) -> int:
    """Length of what two texts begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _chat_template(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise InputError(f"{_KEY}: 'chat', but the tokenizer has no template") from error
