"""The loss of the positions that count, picked out and in chunks, is that of all at once: value, gradients, and far less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict

from panacea_jax.data.batches import Batch
from panacea_jax.defences import Loss, cross_entropy
from panacea_jax.defences.repnoise import layerwise_loss
from panacea_jax.models import lora
from panacea_jax.models.decoder import Head
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import Model, abstract_model, random_model
from panacea_jax.parallel import make_mesh
from tests.on_devices import on_devices
from tests.tiny import write_model

SMALL = {
    "model_type": "llama", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
ROWS, LENGTH = 4, 50


def masks():
    """By name, which tokens are to be predicted."""
    at = np.arange(LENGTH)
    few = (at >= np.array([[20], [33], [41], [5]])) & (at < np.array([[23], [34], [44], [5]]))
    nowhere = np.zeros((ROWS, LENGTH), bool)
    one = nowhere.copy()
    one[2, LENGTH - 1] = True  # predicted by the last position that predicts anything
    return {"few": few, "all": ~nowhere, "half": np.broadcast_to(at >= 25, few.shape), "nowhere": nowhere, "one": one}  # fmt: skip


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 16)


def batch(mask):
    tokens = np.random.default_rng(0).integers(0, 60, mask.shape).astype(np.int32)
    return jax.tree.map(jnp.asarray, Batch(tokens, mask, np.ones(mask.shape, bool)))


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_sum_and_its_gradients_are_those_of_pytorch(name, tied, weighted, small_chunks):
    """By hidden states, head and weights, in float64; with a soft cap where the head is tied. Nothing is shared with what is tested."""
    mask, cap = masks()[name], 3.0 if tied else None
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        x, matrix = rng.normal(size=(ROWS, LENGTH, 8)), rng.normal(size=(60, 8) if tied else (8, 60))
        targets = rng.integers(0, 60, mask.shape)
        given = (matrix, x, rng.uniform(-1, 2, mask.shape)) if weighted else (matrix, x)

        def ours(matrix, x, *weights):
            head = Head(matrix, tied, cap)
            where = jnp.asarray(targets), jnp.asarray(mask), make_mesh()
            return 0.7 * cross_entropy.summed_cross_entropy(head, x, *where, *weights)

        gradient = jax.jit(jax.value_and_grad(ours, tuple(range(len(given)))))
        value, found = gradient(*map(jnp.asarray, given))
    leaves = [torch.tensor(a, requires_grad=True) for a in given]
    logits = leaves[1] @ (leaves[0].T if tied else leaves[0])
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    chosen = torch.tensor(mask.copy())
    each = torch.nn.functional.cross_entropy(logits[chosen], torch.tensor(targets)[chosen], reduction="none")
    total = 0.7 * (each * leaves[2][chosen] if weighted else each).sum()
    total.backward()
    assert float(value) == pytest.approx(float(total.detach()), rel=1e-12)
    for a, b in zip(found, leaves):
        np.testing.assert_allclose(a, b.grad, atol=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["few", "all"])
def test_picking_changes_rounding_only(name, accumulate, monkeypatch):
    """The mean loss in float32 by an adapter and by all weights, whole and in micro-batches, against all logits at once."""
    model = random_model(config_from_dict(SMALL), jax.random.key(0), dtype="float32")
    adapter = jax.tree.map(lambda x: x + 0.02, lora.init(model, 2, 4, ("q", "down"), key=jax.random.key(1)))
    full = Loss(dataclasses.replace(model, weights=None), None, accumulate=accumulate)
    for loss, params in ((Loss.of(model, accumulate), adapter), (full, model.weights)):
        found = []
        for chunk in (16, 10_000):
            monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
            gradient = jax.jit(lambda loss, params, batch: jax.value_and_grad(loss)(params, batch))
            found.append(gradient(loss, params, batch(masks()[name])))
        (value, grads), (whole, expected) = found
        assert float(value) == pytest.approx(float(whole), rel=1e-6)
        scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, atol=1e-6 * scale)


def test_inside_a_scan_that_computes_again(monkeypatch):
    """RepNoise's loss of every layer."""
    model = random_model(config_from_dict(SMALL), jax.random.key(0), dtype="float32")
    states = jax.random.normal(jax.random.key(2), (3, ROWS, LENGTH, 32))
    found = []
    for chunk in (16, 10_000):
        monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
        of_states = lambda s: layerwise_loss(Loss.of(model), None, s, batch(masks()["half"]))  # noqa: E731
        found.append(jax.jit(jax.value_and_grad(of_states))(states))
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-6)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-6 * float(jnp.abs(found[1][1]).max()))


@pytest.mark.parametrize(("name", "turns"), [("few", 1), ("half", 7), ("all", 13), ("nowhere", 0)])
def test_only_positions_that_count_have_logits(name, turns, small_chunks, monkeypatch):
    """7 = ⌈4 · 25 / 16⌉; forward and backward pass together make them once."""
    made, plain = [], cross_entropy._of_positions

    def counting(*arguments):
        jax.debug.callback(lambda: made.append(1))
        return plain(*arguments)

    monkeypatch.setattr(cross_entropy, "_of_positions", counting)
    model = random_model(config_from_dict(SMALL), jax.random.key(0), dtype="float32")
    adapter = lora.init(model, 2, 4, ("q",), key=jax.random.key(1))
    gradient = jax.jit(lambda loss, params, b: jax.grad(loss)(params, b))
    jax.block_until_ready(gradient(Loss.of(model), adapter, batch(masks()[name])))
    jax.effects_barrier()
    assert len(made) == turns


def test_bfloat16(small_chunks):
    """Hidden states and head in bfloat16: sums and logits are float32, and the gradient has the error of one rounding."""
    rng = np.random.default_rng(1)
    x, matrix = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((ROWS, LENGTH, 8), (60, 8)))
    targets, mask = jnp.asarray(rng.integers(0, 60, (ROWS, LENGTH))), jnp.asarray(masks()["half"])

    def total(x):
        head = Head(matrix, True, None)
        return cross_entropy.summed_cross_entropy(head, x, targets, mask, make_mesh()) / 300

    value, by_x = jax.value_and_grad(total)(x)
    exact, wide = jax.value_and_grad(lambda x: _plain(matrix, x, targets, mask) / 300)(x.astype(jnp.float32))  # fmt: skip
    assert value.dtype == jnp.float32 and by_x.dtype == jnp.bfloat16
    assert float(value) == pytest.approx(float(exact), rel=1e-5)
    error = by_x.astype(jnp.float32) - wide
    assert float(jnp.linalg.norm(error)) < 2**-8 * float(jnp.linalg.norm(wide))
    assert abs(float(jnp.vdot(error, wide) / jnp.vdot(wide, wide))) < 2e-4  # no factor that all entries share


def _plain(matrix, x, targets, mask):
    logp = jax.nn.log_softmax(x @ matrix.astype(x.dtype).T)
    return -jnp.where(mask, jnp.take_along_axis(logp, targets[..., None], -1)[..., 0], 0).sum()


@pytest.mark.parametrize("tied", [False, True])
def test_in_bfloat16_the_gradient_takes_the_matrix_as_it_lies(tied):
    """No float32 copy of it anywhere in the program, and the figures of float32 to bfloat16's rounding."""
    rng = np.random.default_rng(2)
    x, matrix = rng.normal(size=(3, 5, 8)), rng.normal(size=(60, 8) if tied else (8, 60))
    by = rng.normal(size=(3, 5, 60)).astype(np.float32)

    def gradients(dtype):
        cast = jnp.asarray(matrix, dtype), jnp.asarray(x, dtype)
        product = lambda m, x: jnp.vdot(Head(m, tied, None)(x), by)  # noqa: E731
        return jax.make_jaxpr(jax.grad(product, (0, 1)))(*cast), jax.grad(product, (0, 1))(*cast)

    program, found = gradients(jnp.bfloat16)
    assert f"f32[{'60,8' if tied else '8,60'}] = convert_element_type" not in str(program)
    for a, b in zip(found, gradients(jnp.float32)[1]):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(np.float32), b, atol=2**-7 * float(jnp.abs(b).max()))


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
    for chunk in (128, 10_000):
        monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
        gradient = jax.jit(lambda w, p, b: jax.grad(Loss(model, w))(p, b))
        compiled = gradient.lower(weights, adapter, Batch(tokens, mask, mask)).compile()
        temporary[chunk] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary[10_000] >= 4 * temporary[128], temporary


def test_eight_devices_pick_from_their_own_rows(tmp_path):
    """Loss and gradients on a mesh with all axes, by an adapter and by all weights, and by a weight of each token."""
    found = on_devices("tests.defences.sharded_cross_entropy", write_model(tmp_path / "base"))
    for mesh, errors in found.items():
        assert max(errors.values()) < 2e-6, (mesh, errors)
