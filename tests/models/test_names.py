"""The name table, against the names that transformers gives."""

import pytest
import transformers as tf

from panacea_jax.errors import InputError
from panacea_jax.models import model as models
from panacea_jax.models import names
from panacea_jax.models.families import config_from_dict
from tests.families import FAMILIES, build

SMALL = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
def test_names_and_shapes_equal_transformers(family):
    theirs = build(family)
    state = theirs.state_dict()
    if theirs.config.tie_word_embeddings:
        del state["lm_head.weight"]
    d = {**theirs.config.to_dict(), "architectures": [type(theirs).__name__]}
    _, shapes = models.abstract_model(config_from_dict(d))
    seen = set()
    for name, tensor in state.items():
        path, layer, how = names.to_ours(name)
        shape = shapes[path] if layer is None else shapes[path][1:]
        assert tuple(tensor.shape) == (shape[::-1] if how == "transpose" else shape)
        assert names.to_hf(path, layer) == (name, how)
        seen.add(path)
    assert seen == set(shapes)


def test_unknown_names():
    for name in ("transformer.wte.weight", "model.layers.x.mlp.up_proj.weight", "lm_head.bias"):
        assert names.to_ours(name) is None
    with pytest.raises(KeyError):
        names.to_hf("layers/self_attn/q_proj/kernel")  # a stacked array has layers
    assert names.HARMLESS.fullmatch("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not names.HARMLESS.fullmatch("model.layers.3.self_attn.q_proj.weight")


def test_a_classifier_has_its_head_in_place_of_the_vocabulary():
    config = tf.LlamaConfig(**SMALL, id2label=dict(enumerate("abc")), tie_word_embeddings=True)
    theirs = tf.LlamaForSequenceClassification(config)
    d = {**config.to_dict(), "architectures": [type(theirs).__name__]}
    ours = config_from_dict(d, classifier=True)
    _, shapes = models.abstract_model(ours)
    assert shapes["score/kernel"] == (48, 3) and "lm_head/kernel" not in shapes
    assert {names.to_ours(name)[0] for name in theirs.state_dict()} == set(shapes)
    assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())
    two = {k: v for k, v in d.items() if k != "id2label"}  # transformers' default is not written
    assert config_from_dict(two, classifier=True).num_labels == 2
    with pytest.raises(InputError, match="id2label must be an object"):
        config_from_dict({**d, "id2label": ["a"]}, classifier=True)
