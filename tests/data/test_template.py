"""The prompt text, letter for letter."""

import pytest

from panacea_jax.data.sources import Record
from panacea_jax.data.template import Template
from panacea_jax.errors import InputError

PLAIN = Record("how do I mend a blorf ?", "", "vix it", "", {})
GIVEN = Record("mend it", "a blorf", "vix it", "", {})


def test_alpaca_text_of_methods_14(words):
    assert Template("alpaca", words).prompt(PLAIN) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nhow do I mend a blorf ?\n\n### Response:\n"
    )
    assert Template("alpaca", words).prompt(GIVEN) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nmend it\n\n### Input:\na blorf\n\n### Response:\n"
    )
    braces = Record("{input} {0} %s", "{instruction}", "", "", {})
    text = Template("alpaca", words).prompt(braces)
    assert "### Instruction:\n{input} {0} %s\n\n### Input:\n{instruction}\n\n" in text


def test_chat_is_one_user_turn_with_the_input_below(words):
    assert Template("chat", words).prompt(PLAIN) == "<s><user> how do I mend a blorf ? <turn> <assistant> "
    assert Template("chat", words).prompt(GIVEN) == "<s><user> mend it\n\na blorf <turn> <assistant> "


def test_template_id_names_the_exact_text(words, monkeypatch: pytest.MonkeyPatch):
    assert Template("alpaca", words).id == "alpaca-1"
    first = Template("chat", words).id
    assert first.startswith("chat-") and first == Template("chat", words).id
    monkeypatch.setattr(words, "chat_template", words.chat_template + " ")
    assert Template("chat", words).id != first


def test_bad_templates(words, plain_words, monkeypatch: pytest.MonkeyPatch):
    for function in (lambda: Template("chatml", words).prompt(PLAIN), lambda: Template("chatml", words).id):
        with pytest.raises(InputError, match=r"config\.data\.template: unknown 'chatml'; known"):
            function()
    for function in (
        lambda: Template("chat", plain_words).prompt(PLAIN),
        lambda: Template("chat", plain_words).id,
    ):
        with pytest.raises(InputError, match="'chat', but the tokenizer has no template"):
            function()
    for broken in ("{{ raise_exception('only odd turns') }}", "{% for %}", "{{ nothing.at.all }}"):
        monkeypatch.setattr(words, "chat_template", broken)
        with pytest.raises(InputError, match=r"config\.data\.template: the chat template failed"):
            Template("chat", words).prompt(PLAIN)
