"""The prompt text, letter for letter."""

import pytest

from panacea_jax.data.sources import Record
from panacea_jax.data.template import render, template_id
from panacea_jax.errors import InputError

PLAIN = Record("how do I mend a blorf ?", "", "vix it", "", {})
GIVEN = Record("mend it", "a blorf", "vix it", "", {})


def test_alpaca_text_of_methods_14():
    assert render(PLAIN, "alpaca", None) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nhow do I mend a blorf ?\n\n### Response:\n"
    )
    assert render(GIVEN, "alpaca", None) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nmend it\n\n### Input:\na blorf\n\n### Response:\n"
    )
    braces = Record("{input} {0} %s", "{instruction}", "", "", {})
    assert "### Instruction:\n{input} {0} %s\n\n### Input:\n{instruction}\n\n" in render(
        braces, "alpaca", None
    )


def test_chat_is_one_user_turn_with_the_input_below(words):
    assert render(PLAIN, "chat", words) == "<s><user> how do I mend a blorf ? <turn> <assistant> "
    assert render(GIVEN, "chat", words) == "<s><user> mend it\n\na blorf <turn> <assistant> "


def test_template_id_names_the_exact_text(words, monkeypatch: pytest.MonkeyPatch):
    assert template_id("alpaca", None) == "alpaca-1"
    first = template_id("chat", words)
    assert first.startswith("chat-") and first == template_id("chat", words)
    monkeypatch.setattr(words, "chat_template", words.chat_template + " ")
    assert template_id("chat", words) != first


def test_bad_templates(words, plain_words, monkeypatch: pytest.MonkeyPatch):
    for function in (lambda: render(PLAIN, "chatml", words), lambda: template_id("chatml", words)):
        with pytest.raises(InputError, match=r"config\.data\.template: unknown 'chatml'; known"):
            function()
    for function in (
        lambda: render(PLAIN, "chat", plain_words),
        lambda: template_id("chat", plain_words),
    ):
        with pytest.raises(InputError, match="'chat', but the tokenizer has no template"):
            function()
    for broken in ("{{ raise_exception('only odd turns') }}", "{% for %}", "{{ nothing.at.all }}"):
        monkeypatch.setattr(words, "chat_template", broken)
        with pytest.raises(InputError, match=r"config\.data\.template: the chat template failed"):
            render(PLAIN, "chat", words)
