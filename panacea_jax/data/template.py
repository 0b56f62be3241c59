"""From a record to the prompt text: ONE function for training, generation and judging.

A defence is measured on prompts of the form it was trained on, so nothing else builds a prompt.
"""

import hashlib
from typing import Any

from panacea_jax.data.sources import Record
from panacea_jax.errors import InputError

TEMPLATES = ("alpaca", "chat")

# The public Alpaca text as the published pipelines use it: with the newline at its end
# (methods.md §14).
_TASK = "Below is an instruction that describes a task"
_CONTEXT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request.\n\n"


def template_id(template: str, tokenizer: Any) -> str:
    """Name of the exact prompt form for manifests: "alpaca-1", or "chat-" and the text's hash."""
    _check(template)
    if template == "alpaca":
        return "alpaca-1"
    return "chat-" + hashlib.sha256(_chat_template(tokenizer).encode()).hexdigest()[:12]


def render(record: Record, template: str, tokenizer: Any) -> str:
    """The prompt of a record, up to where the answer starts.

    Args:
        record: Its `instruction` and, when not empty, its `input` are used.
        template: "alpaca", or "chat" for the tokenizer's own chat template with one user turn.
        tokenizer: A transformers tokenizer; only "chat" looks at it.

    Raises:
        InputError: Unknown template, or a chat template that is absent or refuses the turn.
    """
    _check(template)
    if template == "alpaca":
        opening = _TASK + (_CONTEXT if record.input else "") + _REQUEST
        given = f"### Input:\n{record.input}\n\n" if record.input else ""
        return f"{opening}### Instruction:\n{record.instruction}\n\n{given}### Response:\n"
    _chat_template(tokenizer)
    content = record.instruction + (f"\n\n{record.input}" if record.input else "")
    turns = [{"role": "user", "content": content}]
    try:
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # jinja has many errors, and a template may raise its own
        raise InputError(f"config.data.template: the chat template failed ({error})") from error
    return str(prompt)


def _check(template: str) -> None:
    if template not in TEMPLATES:
        known = " ".join(TEMPLATES)
        raise InputError(f"config.data.template: unknown {template!r}; known: {known}")


def _chat_template(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise InputError(
            "config.data.template: 'chat', but the tokenizer has no template"
        ) from error
