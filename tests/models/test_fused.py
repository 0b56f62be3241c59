"""The fused back-ends against the plain one: splash in Pallas' interpreter, cuDNN's wiring with JAX's own attention in its place."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.errors import InputError
from panacea_jax.models import fused
from panacea_jax.models import model as models
from panacea_jax.models.bound import Inputs
from panacea_jax.models.config import ModelConfig
from tests.families import FAMILIES, VOCAB, build, save
from tests.on_devices import on_devices

# Rows of 150 tokens, two splash blocks, with padding behind, before and in neither.
LENGTH, VALID = 150, ((0, 150), (0, 97), (31, 150))


@pytest.fixture(scope="module", params=list(FAMILIES))
def plain(request, tmp_path_factory):
    folder = save(build(request.param, seed=5), tmp_path_factory.mktemp("hf") / request.param)
    return models.load(folder, dtype="float32", attention="xla")


def with_attention(model, attention):
    """The same weights with another back-end."""
    graphdef, _ = models.abstract_model(model.config, "float32", "none", attention)
    return dataclasses.replace(model, graphdef=graphdef)


def inputs():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (len(VALID), LENGTH)).astype(np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, (start, stop) in enumerate(VALID):
        valid[row, start:stop] = True
    return jnp.asarray(tokens), jnp.asarray(valid)


def segments():
    """Three texts in the first row, two and padding in the second, and one behind padding."""
    numbers = np.zeros((len(VALID), LENGTH), np.int32)
    for row, cuts in enumerate(((0, 40, 47, 150), (0, 90, 97), (31, 150))):
        for number, (start, stop) in enumerate(itertools.pairwise(cuts), 1):
            numbers[row, start:stop] = number
    return jnp.asarray(numbers)


def logits_and_gradients(model, packed=False, right=False):
    """Of the valid positions; the loss weighs every logit differently."""
    tokens, valid = inputs()
    extra = {"segments": segments()} if packed else {"right": right}

    def loss(weights):
        bound = model.bind(weights, None)
        hidden, _ = bound.inspect(Inputs.of(tokens, valid, **extra))
        logits = bound.logits(hidden)
        logits = jnp.where(valid[..., None], logits, 0)
        return jnp.sum(jnp.sin(7 * logits)), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.weights)
    return logits, gradients


def assert_same(got, want):
    (logits, gradients), (their_logits, theirs) = got, want
    np.testing.assert_allclose(logits, their_logits, atol=2e-5, rtol=1e-5)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(theirs), strict=True)
    for ours, other in (tuple(map(np.asarray, pair)) for pair in pairs):
        assert np.linalg.norm(ours - other) <= 2e-5 * np.linalg.norm(other)


def test_splash_equals_plain(plain, monkeypatch):
    """Windows of 5 tokens on all layers, on some and on none, soft caps, one to four key/value heads."""
    monkeypatch.setattr(fused, "INTERPRET", True)
    used = []
    kernel = fused._kernel
    monkeypatch.setattr(fused, "_kernel", lambda *x: used.append(x) or kernel(*x))
    got = [logits_and_gradients(with_attention(plain, "splash"), p) for p in (False, True)]
    for ours, packed in zip(got, (False, True)):
        assert_same(ours, logits_and_gradients(plain, packed))
    assert np.abs(got[0][0] - got[1][0]).max() > 0.1
    found = {window for _, _, window, _ in used}
    assert found == {w if w < LENGTH else 0 for w in plain.config.windows or (0,)}


def test_cudnn_wiring_equals_plain(plain, monkeypatch):
    """Masks, layout and scale of the call; the kernel itself needs a GPU."""
    theirs = jax.nn.dot_product_attention

    def stand_in(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return theirs(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(
        fused, "_cudnn_obstacle", lambda config, *_: "caps" if config.attention_softcap else ""
    )
    model = with_attention(plain, "cudnn")
    if plain.config.attention_softcap:
        with pytest.raises(InputError, match="attention = cudnn: caps; use auto or xla"):
            logits_and_gradients(model)
        return
    for packed in (False, True):
        assert_same(logits_and_gradients(model, packed), logits_and_gradients(plain, packed))


def test_cudnn_by_lengths_equals_plain(plain, monkeypatch):
    """Where padding is behind the texts no mask is handed over, unless layers differ in their window; a row may be all padding."""
    theirs, masked = jax.nn.dot_product_attention, []

    def stand_in(*args, implementation, **kwargs):
        masked.append("mask" in kwargs)
        return theirs(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(fused, "_cudnn_obstacle", lambda config, *_: "")
    monkeypatch.setitem(globals(), "VALID", ((0, LENGTH), (0, 61), (0, 0)))
    if plain.config.attention_softcap:
        pytest.skip("not with soft caps")
    want = logits_and_gradients(plain)
    assert_same(logits_and_gradients(with_attention(plain, "cudnn"), right=True), want)
    assert set(masked) == {len(set(plain.config.windows or (0,))) > 1}


def test_splash_over_eight_devices(tmp_path):
    """Rows and heads split; the key/value heads too, or on every device where there is but one."""
    for family in ("gemma", "gemma2"):
        save(build(family, seed=5), tmp_path / family)
    found = on_devices("tests.models.sharded_splash", tmp_path)
    assert found == [8, "gemma", "gemma2"]


TPU = SimpleNamespace(platform="tpu")
H100 = SimpleNamespace(platform="gpu", compute_capability="9.0")
A100 = SimpleNamespace(platform="gpu", compute_capability="8.0")
MI300 = SimpleNamespace(platform="gpu", compute_capability="gfx942")
V100 = SimpleNamespace(platform="gpu", compute_capability="7.0")
CPU = SimpleNamespace(platform="cpu")
LLAMA = ModelConfig("llama", 8, 8, 8, 1, 1, 1, 128, 1.0)
GEMMA = dataclasses.replace(LLAMA, model_type="gemma", head_dim=256)
GEMMA2 = dataclasses.replace(GEMMA, model_type="gemma2", attention_softcap=50.0)


@pytest.mark.parametrize(
    ("device", "model", "dtype", "name", "why"),
    [
        (CPU, LLAMA, "float32", "xla", "a cpu has no other"),
        (TPU, GEMMA2, "bfloat16", "splash", "the tpu and the model allow it"),
        (TPU, LLAMA, "float16", "xla", "not splash: it takes bfloat16 and float32, not float16"),
        (H100, GEMMA, "bfloat16", "cudnn", "the gpu and the model allow it"),
        (A100, LLAMA, "bfloat16", "cudnn", "the gpu and the model allow it"),
        (A100, GEMMA, "bfloat16", "xla", "not cudnn: it takes heads of up to 128 in steps of 8, not 256"),
        (H100, GEMMA2, "bfloat16", "xla", "not cudnn: it cannot cap scores as gemma2 does"),
        (H100, LLAMA, "float32", "xla", "not cudnn: it takes bfloat16 and float16, not float32"),
        (MI300, LLAMA, "bfloat16", "xla", "not cudnn: it needs an NVIDIA GPU, this is a gfx942"),
        (V100, LLAMA, "float16", "xla", "not cudnn: it needs compute capability 8.0, this GPU has 7.0"),
    ],
)  # fmt: skip
def test_auto_says_which_and_why(device, model, dtype, name, why):
    assert fused.choose_backend("auto", model, dtype, device) == (name, why)
    assert fused.choose_backend("xla", model, dtype, device) == ("xla", "as asked")
    if name != "xla":
        assert fused.choose_backend(name, model, dtype, device) == (name, "as asked")


def test_what_cannot_be_is_refused(tmp_path):
    folder = save(build("gemma2"), tmp_path / "gemma2")
    for asked, why in (
        ("splash", "it needs a TPU, this is a cpu; use auto or xla"),
        ("cudnn", "it needs an NVIDIA GPU, this is a cpu; use auto or xla"),
        ("flash", "one of auto, xla, cudnn, splash"),
    ):
        with pytest.raises(InputError, match=f"config.model.attention = {asked}: {why}"):
            models.load(folder, dtype="float32", attention=asked)
