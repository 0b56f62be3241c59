"""Output heads as the files hold them: against transformers on the same folder."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from panacea_jax.errors import InputError
from panacea_jax.export import save_model
from panacea_jax.models import lora
from panacea_jax.models import model as models
from panacea_jax.models.families import config_from_folder
from panacea_jax.stages.convert import write_merged
from tests.families import VOCAB, build, save

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 9))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def theirs(folder):
    with torch.no_grad():
        loaded = tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        return loaded(torch.tensor(TOKENS)).logits.numpy()


def ours(folder):
    model = models.load(folder, dtype="float32")
    return np.asarray(model.apply(model.weights, None, jnp.asarray(TOKENS))[0])


def edited(family, folder, change):
    """A tied model of which ``change`` edits the tensors."""
    save(build(family, tie_word_embeddings=True), folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def own(tensors):
    torch.manual_seed(5)
    tensors[HEAD] = tensors[EMBEDDING] + 0.2 * torch.randn_like(tensors[EMBEDDING])


def same(tensors):
    tensors[HEAD] = tensors[EMBEDDING].clone()


def under_the_head(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDING)


def one_number(tensors):
    same(tensors)
    tensors[HEAD][-1, -1] += 0.5


@pytest.mark.parametrize("family", ["llama2", "qwen2", "gemma2"])
@pytest.mark.parametrize(
    ("change", "tied"), [(own, False), (one_number, False), (same, True), (under_the_head, True)]
)
def test_a_tied_config(family, change, tied, tmp_path, caplog):
    """A head of its own is used, with one line that says so; else the shared matrix, wherever it is."""
    folder = edited(family, tmp_path / "m", change)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(ours(folder), theirs(folder), atol=1e-4)
    lines = [record.getMessage() for record in caplog.records]
    said = [line for line in lines if "used as a head of its own" in line]
    assert len(said) == (not tied) and all(line.startswith(f"{folder}: ") for line in said)
    model = models.load(folder, dtype="float32")
    assert model.config.tie_embeddings == tied and ("lm_head" in model.weights) == (not tied)


def test_what_is_no_matrix_is_refused(tmp_path):
    """By its shape, the two being alike or not."""
    for name, change in {"alike": lambda row: row.clone(), "unlike": lambda row: row + 1}.items():

        def cut(tensors, change=change):
            tensors[EMBEDDING] = tensors[EMBEDDING][0].clone()
            tensors[HEAD] = change(tensors[EMBEDDING])

        folder = edited("llama2", tmp_path / name, cut)
        with pytest.raises(InputError, match=rf"tensor {EMBEDDING} has shape \(\d+,\)"):
            models.load(folder)


@pytest.mark.parametrize("change", [own, same, under_the_head])
def test_what_is_exported(change, tmp_path):
    """The head stays, and config.json says what the files hold: the same logits there and here."""
    folder = edited("qwen2", tmp_path / "m", change)
    write_merged(str(folder), "", None, tmp_path / "out", models.make_mesh())
    assert config_from_folder(tmp_path / "out").tie_embeddings == (change is not own)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert (HEAD in written) == (change is own) and EMBEDDING in written
    for read in (ours, theirs):
        np.testing.assert_allclose(read(tmp_path / "out"), theirs(folder), atol=1e-4)


def test_all_parameters_and_an_adapter_on_a_head_of_its_own(tmp_path):
    folder = edited("llama2", tmp_path / "m", own)
    model = models.load(folder, dtype="float32")
    adapter = lora.init(model, 2, 4, ("q",), key=jax.random.key(0))
    for name, params in (("full", model.weights), ("adapter", adapter)):
        save_model(model, params, tmp_path / name)
        np.testing.assert_allclose(theirs(tmp_path / name), theirs(folder), atol=1e-4)
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is False  # fmt: skip
