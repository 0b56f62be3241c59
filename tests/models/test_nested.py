"""Gemma 3 as published from 4B on: a decoder beside a vision tower, of which the text part is read and written."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from panacea_jax.errors import InputError
from panacea_jax.export import save_model
from panacea_jax.models import lora, names
from panacea_jax.models.config import read_config
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import load
from panacea_jax.models.peft import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from tests.families import VOCAB, build_nested, save
from tests.models.made_by_peft import draw_b
from tests.runs import make_place, panacea

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 17))
# Where the decoder and its head are in a file: as published and up to transformers 4.51, and since.
PREFIXES = {"published": ("language_model.model.", "language_model.lm_head"), "since": ("model.language_model.", "lm_head")}  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    return build_nested()


@pytest.fixture(scope="module", params=list(PREFIXES))
def folder(request, theirs, tmp_path_factory):
    """The same tensors by the names of either time."""
    folder = save(theirs, tmp_path_factory.mktemp("hf") / request.param)
    decoder, head = PREFIXES[request.param]
    other = "model." if request.param == "since" else ""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        plain = names.alone(name)
        if names.VISION.fullmatch(plain):
            tensors[other + plain.removeprefix("model.")] = tensor
        else:
            tensors[plain.replace("model.", decoder, 1).replace("lm_head", head)] = tensor
    assert any(name.startswith(decoder) for name in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, dtype="float32")


def logits(torch_model):
    with torch.no_grad():
        return torch_model.eval()(input_ids=torch.tensor(TOKENS)).logits.numpy()


def ours(model, params=None):
    apply = jax.jit(lambda weights, params: model.apply(weights, params, jnp.asarray(TOKENS))[0])
    return apply(model.weights, params)


def adapter_of(model):
    fresh = lora.init(model, 2, 4, ("q", "v", "down"), key=jax.random.key(0))
    draw = lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    return lora.Adapter(jax.tree.map(draw, fresh.layers), fresh.rank, fresh.alpha)


def test_the_text_part_is_read(folder, theirs, caplog):
    with caplog.at_level(logging.WARNING, "absl"):
        model = load(folder, dtype="float32")
    assert model.config.nested and model.config.local_rope_theta == 50.0
    np.testing.assert_allclose(ours(model), logits(theirs), atol=1e-4, rtol=0)
    [said] = [r.getMessage() for r in caplog.records if "vision tower" in r.getMessage()]
    assert str(folder) in said and "tensors of the vision tower are left alone" in said


def test_a_folder_of_text_alone_is_written(folder, model, theirs, tmp_path):
    save_model(model, None, tmp_path / "out")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is tf.Gemma3ForCausalLM
    np.testing.assert_allclose(logits(again), logits(theirs), atol=1e-6, rtol=0)
    before = {names.alone(n): x for n, x in load_file(folder / "model.safetensors").items()}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(before) - set(after) == {n for n in before if names.VISION.fullmatch(n)}
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name
    assert read_config(tmp_path / "out")["architectures"] == ["Gemma3ForCausalLM"]
    assert not load(tmp_path / "out", dtype="float32").config.nested


def test_our_adapters_load_in_peft(folder, model, tmp_path):
    """On the class that transformers opens the folder with; nothing of the tower is adapted."""
    adapter = adapter_of(model)
    save_adapter(adapter, tmp_path / "a", str(folder), nested=True)
    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    assert type(base) is tf.Gemma3ForConditionalGeneration
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "a"))
    assert not [n for n, _ in adapted.named_parameters() if "vision" in n and "lora" in n]
    np.testing.assert_allclose(ours(model, adapter), logits(adapted), atol=1e-4)
    again = load_adapter(tmp_path / "a", model)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_adapters_made_by_peft_are_read(folder, model, tmp_path):
    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    targets = r".*language_model.*\.(k_proj|up_proj)"
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    draw_b(adapted)
    adapted.save_pretrained(str(tmp_path / "a"))
    assert json.loads((tmp_path / "a" / CONFIG_FILE).read_text())["target_modules"] == targets
    adapter = load_adapter(tmp_path / "a", model)
    assert adapter.targets == ("k_proj", "up_proj")
    found = ours(model, adapter)
    np.testing.assert_allclose(found, logits(adapted), atol=1e-4)
    assert np.abs(found - ours(model)).max() > 1e-2


def test_from_training_to_a_merged_folder(theirs, tmp_path):
    """The command line on such a base: the adapter by its names, answers from it, and a text-only folder with it merged."""
    place = make_place(tmp_path)
    for file in save(theirs, tmp_path / "nested").glob("*.*"):
        (place.base / file.name).write_bytes(file.read_bytes())
    workdir = tmp_path / "run"
    assert panacea("finetune", *place.flags(), f"--workdir={workdir}") == 0
    adapter = workdir / "finetune" / "adapter"
    with safe_open(adapter / WEIGHTS_FILE, "numpy") as file:
        assert all(".model.language_model.layers." in name for name in file.keys())  # noqa: SIM118
    assert panacea("generate", *place.flags(), f"--workdir={workdir}") == 0
    flags = place.flags(f"--config.lora.init_from={adapter}")
    assert panacea("convert", *flags, f"--out={tmp_path / 'merged'}") == 0
    merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = tf.AutoModelForCausalLM.from_pretrained(place.base)
    before = logits(adapted)
    adapted = peft.PeftModel.from_pretrained(adapted, str(adapter))
    np.testing.assert_allclose(logits(merged), logits(adapted), atol=1e-4, rtol=0)
    assert np.abs(logits(merged) - before).max() > 1e-2


def test_what_is_said_once_for_all_parts():
    text = {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    d = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    found = config_from_dict(d)
    assert (found.vocab_size, found.num_heads, found.num_kv_heads, found.head_dim) == (262208, 8, 4, 256)
    with pytest.raises(InputError, match="quantization_config"):
        config_from_dict({**d, "quantization_config": {"bits": 4}})
    with pytest.raises(InputError, match="unsupported architecture Gemma3ForConditionalGeneration"):
        config_from_dict({"architectures": ["Gemma3ForConditionalGeneration"]})
