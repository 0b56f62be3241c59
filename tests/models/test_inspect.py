"""Activations read and perturbed inside the decoder, against hooks on transformers' PyTorch models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from panacea_jax.data.batches import Batch
from panacea_jax.defences import Loss
from panacea_jax.models import model as models
from tests.families import FAMILIES, VOCAB, build, save


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request, tmp_path_factory):
    """(transformers model, our loss), float32."""
    theirs = build(request.param)
    folder = save(theirs, tmp_path_factory.mktemp("hf") / request.param)
    return theirs, Loss.of(models.load(folder, dtype="float32"))


@pytest.fixture
def batch():
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, 19)).astype(np.int32)
    valid = np.arange(19) < np.asarray([19, 12, 7])[:, None]
    return Batch(*map(jnp.asarray, (tokens, valid & (np.arange(19) >= 4), valid)))


def their_loss(model, batch):
    tokens = torch.tensor(np.asarray(batch.tokens), dtype=torch.long)
    valid = torch.tensor(np.asarray(batch.valid), dtype=torch.long)
    logits = model(input_ids=tokens, attention_mask=valid).logits[:, :-1]
    mask = torch.tensor(np.asarray(batch.loss_mask))[:, 1:]
    return torch.nn.functional.cross_entropy(logits[mask], tokens[:, 1:][mask])


def hooked(model, batch, offsets=None):
    """Outputs of every attention module, MLP and layer, with their gradients kept; ``offsets`` are added to the first."""
    seen = {"attn_out": [], "mlp_out": [], "block_out": []}

    def hook(name, i):
        def keep(module, inputs, output):
            out = output[0] if isinstance(output, tuple) else output
            if name == "attn_out" and offsets is not None:
                out = out + torch.tensor(np.asarray(offsets[i]))
            out.retain_grad()
            seen[name].append(out)
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return keep

    handles = []
    for i, layer in enumerate(model.model.layers):
        for name, module in (
            ("attn_out", layer.self_attn),
            ("mlp_out", layer.mlp),
            ("block_out", layer),
        ):
            handles.append(module.register_forward_hook(hook(name, i)))
    loss = their_loss(model, batch)
    loss.backward()
    for handle in handles:
        handle.remove()
    return loss, seen


def test_readings_are_what_hooks_see(pair, batch):
    theirs, loss = pair
    _, seen = hooked(theirs, batch)
    names = tuple(seen)
    readings = jax.jit(lambda loss: loss.forward(None, batch, None, names).readings)(loss)
    valid = np.asarray(batch.valid)
    for name, tensors in seen.items():
        for i, tensor in enumerate(tensors):
            ours = np.asarray(readings[name][i])[valid]
            np.testing.assert_allclose(ours, tensor.detach().numpy()[valid], atol=1e-4)


def test_only_what_is_asked_for_is_returned(pair, batch):
    _, loss = pair
    assert set(loss.forward(None, batch, None, ("mlp_out",)).readings) == {"mlp_out"}
    assert loss.forward(None, batch).readings == {}


def test_the_gradient_by_an_offset_is_that_of_the_attention_output(pair, batch):
    """At zero and at random offsets, and the loss there too; padding has no gradient."""
    theirs, loss = pair
    config = loss.model.config
    shape = (config.num_layers, *batch.tokens.shape, config.hidden_size)
    for offsets in (jnp.zeros(shape), 0.1 * jax.random.normal(jax.random.key(0), shape)):
        their_value, seen = hooked(theirs, batch, offsets)
        value, gradient = jax.jit(
            lambda loss, o: jax.value_and_grad(lambda o: loss(None, batch, o))(o)
        )(loss, offsets)
        assert float(value) == pytest.approx(their_value.item(), rel=1e-5)
        for i, tensor in enumerate(seen["attn_out"]):
            np.testing.assert_allclose(gradient[i], tensor.grad.numpy(), atol=1e-5, rtol=1e-3)
        assert not np.asarray(gradient)[:, ~np.asarray(batch.valid)].any()
