"""The loss in chunks of positions is the loss at once: value, gradients, and far less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from panacea_jax.data.batches import Batch
from panacea_jax.defences import loss as loss_module
from panacea_jax.defences.loss import Loss
from panacea_jax.models import lora
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import Model, abstract_model, random_model
from panacea_jax.parallel import make_mesh

SMALL = {
    "model_type": "llama", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip


def batch(rows, length):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 60, (rows, length)), jnp.int32)
    valid = jnp.arange(length) < jnp.asarray([length, length - 7, 5])[:rows, None]
    return Batch(tokens, valid & (jnp.arange(length) >= 3), valid)


@pytest.mark.parametrize("length", [33, 34, 65, 100])
def test_chunks_change_nothing(length, monkeypatch):
    """At one position beyond a chunk, at whole chunks and between; by adapters and by all weights."""
    model = random_model(config_from_dict(SMALL), jax.random.key(0), dtype="float32")
    adapter = lora.init(model, 2, 4, ("q", "down"), key=jax.random.key(1))
    full = Loss(dataclasses.replace(model, weights=None), None)
    for loss, params in ((Loss.of(model), adapter), (full, model.weights)):
        found = []
        for chunk in (32, 10_000):
            monkeypatch.setattr(loss_module, "CHUNK", chunk)
            found.append(
                jax.jit(jax.value_and_grad(Loss.__call__, argnums=1))(
                    loss, params, batch(3, length)
                )
            )
        (value, grads), (whole, expected) = found
        assert float(value) == pytest.approx(float(whole), rel=1e-6)
        scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, atol=1e-6 * scale)


def test_memory_at_a_vocabulary_of_256k(monkeypatch):
    """Compiled, not run: temporaries of a gradient at [4, 256] tokens are at least four times lower."""
    config = config_from_dict(SMALL | {"vocab_size": 256_000})
    graphdef, shapes = abstract_model(config, "float32")
    weights = unflatten_dict(
        {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}, sep="/"
    )
    model = Model(config, graphdef, None, jnp.dtype("float32"), make_mesh())
    adapter = jax.eval_shape(lambda key: lora.init(model, 2, 4, key=key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    mask = jax.ShapeDtypeStruct((4, 256), jnp.bool_)
    temporary = {}
    for chunk in (32, 10_000):
        monkeypatch.setattr(loss_module, "CHUNK", chunk)
        gradient = jax.jit(lambda w, p, b: jax.grad(Loss(model, w))(p, b))
        compiled = gradient.lower(weights, adapter, Batch(tokens, mask, mask)).compile()
        temporary[chunk] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary[10_000] >= 4 * temporary[32], temporary
