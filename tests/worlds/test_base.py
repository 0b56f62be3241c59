"""The miniature base: a Hugging Face folder that transformers loads and that computes what ours does."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from panacea_jax.data.sources import Record
from panacea_jax.data.template import Template
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.errors import InputError
from panacea_jax.generate.ends import eos_ids
from panacea_jax.models.model import load
from panacea_jax.worlds import miniature
from panacea_jax.worlds.base import LLAMA, STDDEV, write_base

WORDS = ["blorf", "gandle", "mend", "the", "?", "sure", "assistant"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base"
    write_base(path, WORDS, 5)
    return path


def test_transformers_loads_it_and_agrees_with_us(folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert isinstance(theirs, LlamaForCausalLM) and theirs.dtype == torch.float32
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        assert getattr(theirs.config, key) == LLAMA[key]
    tokens = np.arange(10)[None] % theirs.config.vocab_size
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    ours = load(folder, dtype="float32")
    logits, _ = ours.apply(ours.weights, None, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_weights_are_random_and_a_function_of_the_seed(folder, tmp_path):
    for name, seed in (("same", 5), ("other", 6)):
        write_base(tmp_path / name, WORDS, seed)
    same, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("same", "other"))
    assert (folder / "model.safetensors").read_bytes() == same != other
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(STDDEV, rel=0.05)


def test_tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == len({"<pad>", "<eos>", "<unk>", *WORDS, "user", ":"})
    ids = tokenizer("mend the blorf ?").input_ids
    assert len(ids) == 4 and tokenizer.decode(ids) == "mend the blorf ?"
    assert tokenizer("frumious").input_ids == [2]
    assert AutoTokenizer.from_pretrained(folder)("mend the blorf ?").input_ids == ids


def test_chat_prompts_end_where_the_answer_starts(folder):
    tokenizer = load_tokenizer(folder)
    prompt = Template("chat", tokenizer).prompt(Record("mend the blorf ?", "", "sure", "sure", {}))
    assert prompt == "user : mend the blorf ? assistant "
    words = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
    assert words == ["user", ":", "mend", "the", "blorf", "?", "assistant"]
    whole = tokenizer(prompt + "sure" + tokenizer.eos_token).input_ids
    assert whole[: len(words)] == tokenizer(prompt).input_ids and whole[-1] == 1


def test_a_world_cut_short_is_written_again(tmp_path, monkeypatch):
    """A kill while its files are written leaves a folder that the same command takes up; someone else's stays refused."""

    def die(*_, **__):
        raise KeyboardInterrupt

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    miniature.make_world(whole, 3, "tiny")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(miniature, "write_base", die)
        miniature.make_world(cut, 3, "tiny")
    (cut / "data" / "user.jsonl").write_text("torn")
    miniature.make_world(cut, 3, "tiny")
    files = [p.relative_to(whole) for p in whole.rglob("*") if p.is_file()]
    assert files and all((cut / p).read_bytes() == (whole / p).read_bytes() for p in files)
    (tmp_path / "other" / "data").mkdir(parents=True)
    with pytest.raises(InputError, match="not empty and not a quickstart's"):
        miniature.make_world(tmp_path / "other", 3, "tiny")


def test_generation_ends_at_eos(folder):
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    assert eos_ids(Template("chat", load_tokenizer(folder)), folder) == [1]
