"""The name table, against the names that transformers gives."""

import pytest

from panacea_jax.models import model as models
from panacea_jax.models import names
from panacea_jax.models.config import ModelConfig
from tests.families import FAMILIES, build


@pytest.mark.parametrize("family", list(FAMILIES))
def test_names_and_shapes_equal_transformers(family):
    theirs = build(family)
    state = theirs.state_dict()
    if theirs.config.tie_word_embeddings:
        del state["lm_head.weight"]
    d = {**theirs.config.to_dict(), "architectures": [type(theirs).__name__]}
    _, shapes = models.abstract(ModelConfig.from_dict(d))
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
