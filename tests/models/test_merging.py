"""Adapter + base → merged folder → transformers, in every family: the logits are those of peft."""

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers as tf

from panacea_jax.models import lora
from panacea_jax.models import model as models
from panacea_jax.models.adapter import BLOCK_OF
from panacea_jax.stages.convert import write_merged
from tests.families import FAMILIES, VOCAB, build, save
from tests.models.made_by_peft import draw_b

TOKENS = torch.tensor(np.random.default_rng(0).integers(0, VOCAB, (2, 9)))


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits.numpy()


def opened(folder):
    return tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize("targets", [list(BLOCK_OF), ["q_proj"]], ids=["all", "q"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma_biased"])
def test_the_merged_folder_computes_what_peft_does(family, targets, tmp_path):
    """Biases included: they stay as they are, and the product goes to the kernel beside them."""
    biased = {"attention_bias": True} if family == "gemma_biased" else {}
    base = save(build(family.removesuffix("_biased") if biased else family, **biased), tmp_path / "b")
    adapted = peft.get_peft_model(
        opened(base), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, lora_dropout=0.0)
    )
    draw_b(adapted)
    adapted.save_pretrained(str(tmp_path / "a"))
    model = models.load(base, dtype="float32")
    write_merged(str(base), str(tmp_path / "a"), None, tmp_path / "out", model.mesh)
    wanted = logits(adapted)
    np.testing.assert_allclose(logits(opened(tmp_path / "out")), wanted, atol=1e-4)
    assert np.abs(wanted - logits(opened(base))).max() > 1e-2
    # The merge in memory, which generate can decode with, is the same.
    merged = lora.merge(model.weights, lora.load(tmp_path / "a", model))
    again = np.asarray(model.apply(merged, None, jnp.asarray(TOKENS.numpy()))[0])
    np.testing.assert_allclose(again, wanted, atol=1e-4)
