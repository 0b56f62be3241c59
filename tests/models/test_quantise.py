"""Quantised kernels against numpy, and the model on them against the one that has their dense weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from panacea_jax import cli
from panacea_jax.config import get_config, validate
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models import model as models
from panacea_jax.models.quantise import _BLOCK, QUANTIZATIONS, Quantised, nf4_levels, quantise
from tests.families import FAMILIES, VOCAB, build, save
from tests.runs import make_place


def test_nf4_levels_are_those_of_the_paper():
    """Appendix E of arXiv 2305.14314, to the digits printed there."""
    levels = nf4_levels()
    assert levels.shape == (16,) and levels[0] == -1 and levels[-1] == 1 and levels[7] == 0
    np.testing.assert_allclose(levels[1:3], [-0.6961928009986877, -0.5250730514526367], atol=1e-6)
    np.testing.assert_allclose(levels[8:10], [0.07958029955625534, 0.16093020141124725], atol=1e-6)


@pytest.mark.parametrize("shape", [(128, 6), (3, 192, 5), (2, 48, 4)])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_every_weight_goes_to_the_nearest_level(kind, shape):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    w[..., :16, 0] = 0
    got = quantise(jnp.asarray(w), kind)
    block = min(_BLOCK, 16 if shape[-2] == 48 else 64)
    blocks = w.reshape(*shape[:-2], -1, block, shape[-1])
    scale = np.abs(blocks).max(axis=-2, keepdims=True)
    np.testing.assert_array_equal(got.scale, scale[..., 0, :])
    levels = np.arange(-127, 128) / 127 if kind == "int8" else nf4_levels()
    nearest = np.abs(blocks[..., None] - scale[..., None] * levels).min(axis=-1)
    off = np.abs(np.asarray(got.dense(jnp.float32)).reshape(blocks.shape) - blocks)
    np.testing.assert_allclose(off, nearest, atol=1e-6)
    assert not np.asarray(got.dense(jnp.float32))[w == 0].any()
    bits = 8 * sum(x.nbytes for x in jax.tree.leaves(got)) / w.size
    assert bits == {"int8": 8, "nf4": 4}[kind] + 32 / block


def test_an_odd_number_of_inputs_is_refused():
    with pytest.raises(ValueError, match="nf4 packs pairs of inputs, there are 5"):
        quantise(jnp.ones((5, 2)), "nf4")


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request, tmp_path_factory):
    return save(build(request.param, seed=5), tmp_path_factory.mktemp("hf") / request.param)


@pytest.mark.parametrize(("kind", "remat"), [("int8", "none"), ("nf4", "full")])
def test_model_on_quantised_weights(folder, kind, remat):
    """Logits and gradients of the adapter are those of the dense weights that the quantised ones stand for."""
    model = models.load(folder, dtype="float32", remat=remat, quantization=kind)
    held = [x for x in jax.tree.leaves(model.weights, is_leaf=_quantised) if _quantised(x)]
    assert len(held) == 7
    dense = jax.tree.map(
        lambda x: x.dense(jnp.float32) if _quantised(x) else x, model.weights, is_leaf=_quantised
    )
    adapter = lora.init(model, 2, 4.0, ("q", "o", "up", "down"), key=jax.random.key(0))
    noise = iter(jax.random.split(jax.random.key(1), 99))
    draw = lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape)  # noqa: E731
    adapter = dataclasses.replace(adapter, layers=jax.tree.map(draw, adapter.layers))
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, VOCAB, (2, 12)), jnp.int32)

    def loss(layers, weights):
        params = dataclasses.replace(adapter, layers=layers)
        logits, _ = model.apply(weights, params, tokens)
        return jnp.sum(jnp.sin(logits)), logits

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, logits), gradients = run(adapter.layers, model.weights)
    (_, wanted), theirs = run(adapter.layers, dense)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    for ours, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(ours - other) <= 1e-5 * np.linalg.norm(other)


def _quantised(x):
    return isinstance(x, Quantised)


def test_what_needs_whole_weights_is_refused(tmp_path):
    model = models.load(save(build("llama2"), tmp_path / "a"), dtype="float32", quantization="nf4")
    adapter = lora.init(model, 2, 4.0, key=jax.random.key(0))
    with pytest.raises(
        InputError, match="config.model.quantization = nf4: merging an adapter needs whole weights"
    ):
        lora.merge(model.weights, adapter)


def test_a_run_on_few_bits(tmp_path):
    """Fine-tuning, answers and a merged export: the adapter differs from the whole base's, and is an ordinary one."""
    place = make_place(tmp_path)
    adapters = {}
    for kind in ("", "nf4"):
        workdir = tmp_path / (kind or "whole")
        flags = place.flags(f"--config.model.quantization={kind}")
        assert cli.run(["finetune", *flags, f"--workdir={workdir}"]) == 0
        adapters[kind] = load_file(workdir / "finetune" / "adapter" / "adapter_model.safetensors")
    assert cli.run(["generate", *flags, f"--workdir={workdir}"]) == 0
    assert adapters[""].keys() == adapters["nf4"].keys()
    apart = [np.abs(adapters[""][name] - adapters["nf4"][name]).max() for name in adapters[""]]
    assert 1e-5 < max(apart) < 0.1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.full_parameters", True),
        ("align.train.full_parameters", True),
        ("lora.policy", "merged"),
        ("generate.merge", True),
        ("heal.defence.name", "safelora"),
        ("heal.defence.name", "safemerge"),
        ("defence.name", "asft"),
    ],
)
def test_a_base_that_is_to_change_is_refused(key, value):
    config = get_config()
    config.model.quantization = "nf4"
    validate(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=f"quantization = '?nf4'?: only for a frozen base; {key}"):
        validate(config)
