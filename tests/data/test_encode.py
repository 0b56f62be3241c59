"""Ids against transformers called directly, as methods.md §14 says."""

import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from panacea_jax.data.chat import Turn
from panacea_jax.data.encode import Example, encode, encode_all, encode_prompt
from panacea_jax.data.sources import Record, load_records
from panacea_jax.data.template import Template
from panacea_jax.errors import InputError


def prompt_length(example: Example) -> int:
    """Tokens before the answer, which is the rest."""
    length = len(example.tokens) - int(example.loss_mask.sum())
    assert example.loss_mask[length:].all()
    return length


HEAD = "Below is an instruction that describes a task"
TAIL = ". Write a response that appropriately completes the request.\n\n### Instruction:\n"


def reference(prompt: str, target: str, tokenizer, max_length: int) -> tuple[list[int], list[int]]:
    """Ids and labels of the published pipelines: two tokenisations, prompt labels −100."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, truncation=True, max_length=max_length).input_ids

    whole, given = ids(prompt + target + tokenizer.eos_token), ids(prompt)
    return whole, [-100] * len(given) + whole[len(given) :]


@pytest.mark.parametrize("max_length", [256, 60])
def test_real_rows_equal_direct_tokenisation(shared: Path, llama2, max_length: int):
    direct = AutoTokenizer.from_pretrained(str(shared / "tokenizers" / "llama2"))
    cut = 0
    for task, file in (
        ("gsm8k", "gsm8k/train"),
        ("sst2", "sst2/train"),
        ("alpaca", "alpaca/train"),
    ):
        path = shared / f"{file}.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for _, line in zip(range(40), stream)]
        records = load_records(f"{task}@{path}", "k")[:40]
        for row, record in zip(rows, records):
            if task == "gsm8k":
                prompt = f"{HEAD}{TAIL}{row['question']}\n\n### Response:\n"
                target = row["answer"].replace("####", "The final answer is: ")
            else:
                question = row.get("instruction") or (
                    "Analyze the sentiment of the input, and respond only positive or negative"
                )
                given = row["sentence"] if task == "sst2" else row["input"]
                more = ", paired with an input that provides further context" if given else ""
                section = f"### Input:\n{given}\n\n" if given else ""
                prompt = f"{HEAD}{more}{TAIL}{question}\n\n{section}### Response:\n"
                target = (
                    row["output"] if task == "alpaca" else ["negative", "positive"][row["label"]]
                )
            ids, labels = reference(prompt, target, direct, max_length)
            example = encode(record, Template("alpaca", llama2), max_length)
            assert example.tokens.tolist() == ids
            assert example.tokens.dtype == np.int32
            masked = np.where(np.arange(len(ids)) < prompt_length(example), -100, example.tokens)
            assert masked.tolist() == labels[: len(ids)]
            assert encode_prompt(record, Template("alpaca", llama2)) == direct(prompt).input_ids
            cut += len(ids) == max_length
    assert cut >= 1


def test_bos_first_and_eos_last(llama2):
    record = Record("Hello world 12", "", "Hello", "", {})
    example = encode(record, Template("alpaca", llama2), 256)
    assert example.tokens[0] == 1 and example.tokens[-1] == 2
    # The prompt's last newline is one token (13), and the answer starts a word without a space.
    assert example.tokens[prompt_length(example) - 1] == 13
    assert llama2.decode(example.tokens[prompt_length(example) :]) == "Hello</s>"
    assert (example.tokens == 1).sum() == 1


RECORD = Record("how do I mend a blorf ?", "", "take a gandle and vix it", "", {})


def test_alpaca_with_the_small_tokenizer(words):
    example = encode(RECORD, Template("alpaca", words), 256)
    tokens = words.convert_ids_to_tokens(example.tokens.tolist())
    assert tokens[:4] == ["<s>", "Below", "is", "an"]
    assert tokens[prompt_length(example) :] == [*RECORD.output.split(), "</s>"]


def test_chat_has_the_templates_bos_and_no_other(words):
    example = encode(RECORD, Template("chat", words), 256)
    prompt = f"<s> <user> {RECORD.instruction} <turn> <assistant>".split()
    answer = f"{RECORD.output} <turn>".split()
    assert words.convert_ids_to_tokens(example.tokens.tolist()) == prompt + answer
    assert prompt_length(example) == len(prompt)
    assert encode_prompt(RECORD, Template("chat", words)) == example.tokens[: len(prompt)].tolist()
    # transformers' own way to the same ids
    turns = [{"role": "user", "content": RECORD.instruction}]
    direct = words.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    assert encode_prompt(RECORD, Template("chat", words)) == list(direct["input_ids"])


def test_cut_on_the_right(words):
    whole = encode(RECORD, Template("chat", words), 256).tokens.tolist()
    prompt = len(encode_prompt(RECORD, Template("chat", words)))
    for max_length in (1, prompt - 1, prompt, prompt + 1, len(whole) - 1, len(whole)):
        example = encode(RECORD, Template("chat", words), max_length)
        assert example.tokens.tolist() == whole[:max_length]
        assert prompt_length(example) == min(prompt, max_length)
        assert example.has_target == (max_length > prompt)


def test_an_empty_output_leaves_eos_to_learn(words):
    example = encode(Record("mend", "", "", "", {}), Template("chat", words), 256)
    assert example.tokens[prompt_length(example) :].tolist() == words.convert_tokens_to_ids(["<turn>"])


def test_records_without_target_stay_in_place_and_are_counted(words, caplog):
    long = Record("mend " * 40, "", "vix", "", {})
    with caplog.at_level(logging.WARNING, logger="panacea_jax"):
        examples = encode_all([RECORD, long, RECORD, long], Template("chat", words), 30, "config.data.user")
    assert [example.has_target for example in examples] == [True, False, True, False]
    assert len(examples[1].tokens) == 30
    empty, cut = caplog.messages
    assert empty.startswith("config.data.user: 2 of 4 records") and "max_length=30" in empty
    assert cut == "config.data.user: 2 of 4 answers are cut at config.data.max_length=30"
    with caplog.at_level(logging.WARNING, logger="panacea_jax"):
        caplog.clear()
        encode_all([RECORD], Template("chat", words), 30, "config.data.user")
    assert not caplog.messages


def test_all_prompts_too_long(words):
    with pytest.raises(
        InputError, match=r"^config\.data\.user: no target token .* any of the 2 .*=5"
    ):
        encode_all([RECORD, RECORD], Template("chat", words), 5, "config.data.user")


def test_answers_that_are_cut_are_counted_and_may_be_refused(words, caplog):
    template, long = Template("chat", words), Record("mend", "", "vix " * 40, "", {})
    with caplog.at_level(logging.WARNING, logger="panacea_jax"):
        encode_all([RECORD, long], template, 30, "config.data.user", max_cut=0.5)
    assert caplog.messages == ["config.data.user: 1 of 2 answers are cut at config.data.max_length=30"]
    with pytest.raises(
        InputError,
        match=r"^config\.data\.user: 1 of 2 answers are cut at config\.data\.max_length=30, more than config\.data\.max_cut=0\.4 allows",
    ):
        encode_all([RECORD, long], template, 30, "config.data.user", max_cut=0.4)


def test_a_record_without_a_form_is_named_by_its_number(words):
    several = Record("b", "", "c", "c", {}, (Turn("user", "a"), Turn("assistant", "b")))
    with pytest.raises(InputError, match=r"^config\.data\.user: record 2: config\.data\.template: 'alpaca' is one"):
        encode_all([RECORD, several], Template("alpaca", words), 256, "config.data.user")
