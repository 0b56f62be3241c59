"""Our decoder against transformers' PyTorch models."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from panacea_jax.errors import InputError
from panacea_jax.models import model as models
from panacea_jax.models.bound import Inputs
from panacea_jax.models.cache import init_cache, settle
from panacea_jax.models.config import ModelConfig
from tests.families import FAMILIES, SETTINGS, VOCAB, build, save
from tests.on_devices import xla_flags


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request, tmp_path_factory):
    """(transformers model, ours), float32."""
    theirs = build(request.param)
    folder = save(theirs, tmp_path_factory.mktemp("hf") / request.param)
    return theirs, models.load(folder, dtype="float32")


def _their_logits(theirs, tokens, valid):
    positions = np.maximum(np.cumsum(valid, 1) - 1, 0)
    with torch.no_grad():
        out = theirs(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(valid.astype(np.int64)),
            position_ids=torch.tensor(positions),
        )
    return out.logits.numpy()


def _tokens(rows=3, length=19, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def _apply(model):
    return jax.jit(lambda w, t, v: model.apply(w, None, t, valid=v)[0])


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_equal_transformers(pair, side):
    _assert_logits(*pair, side)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_logits_of_published_settings(name, tmp_path):
    theirs = build(name)
    _assert_logits(theirs, models.load(save(theirs, tmp_path / name), dtype="float32"), "left")


def _assert_logits(theirs, ours, side):
    tokens = _tokens()
    valid = np.ones(tokens.shape, bool)
    if side != "none":
        valid[1, : 7 if side == "left" else 19] = side == "right"
        valid[2, 8:] = True
        if side == "left":
            valid[2, :3] = False
        else:
            valid[1, 12:] = False
            valid[2, 17:] = False
    got = _apply(ours)(ours.weights, jnp.asarray(tokens), jnp.asarray(valid))
    want = _their_logits(theirs, tokens, valid)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got)[valid], want[valid], atol=1e-4, rtol=0)
    assert np.abs(want[valid]).max() > 0.5  # the comparison is not of zeros
    assert np.isfinite(np.asarray(got)).all()


def test_incremental_equals_whole(pair):
    _, ours = pair
    tokens = jnp.asarray(_tokens(2, 14))
    whole = _apply(ours)(ours.weights, tokens, jnp.ones(tokens.shape, bool))
    step = jax.jit(lambda w, t, p, c: ours.apply(w, None, t, p, cache=c))
    cache = init_cache(ours.config, 2, 20, 10, jnp.float32)
    parts = []
    for start, stop in ((0, 8), (8, 10), (10, 11), (11, 12)):
        positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        logits, cache = step(ours.weights, tokens[:, start:stop], positions, cache)
        parts.append(logits)
        if stop in (10, 11):
            cache = settle(cache, jnp.full(2, cache.fresh))
    assert cache.length.tolist() == [11, 11] and cache.fresh == 1
    np.testing.assert_allclose(np.concatenate(parts, 1), whole[:, :12], atol=2e-5, rtol=0)


def test_hidden_then_logits_of_a_slice():
    ours = _model(_small(final_softcap=2.0))
    tokens = jnp.asarray(_tokens(2, 8) % 64)

    @jax.jit
    def both(weights):
        bound = ours.bind(weights, None)
        hidden, _ = bound.hidden(Inputs.of(tokens))
        some = bound.logits(hidden[:, -2:])
        return some, ours.apply(weights, None, tokens)[0]

    some, whole = both(ours.weights)
    np.testing.assert_allclose(some, whole[:, -2:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3"])
def test_gradients_equal_transformers(family, tmp_path):
    """Full-parameter mode: the nested weights are the trainable pytree."""
    theirs = build(family)
    ours = models.load(save(theirs, tmp_path / family), dtype="float32")
    tokens = _tokens(2, 11)

    def loss(params):
        logits = ours.apply(None, params, jnp.asarray(tokens))[0]
        return jnp.mean(jnp.sin(logits))

    got = jax.jit(jax.grad(loss))(ours.weights)["layers"]
    theirs.zero_grad()
    torch.sin(theirs(input_ids=torch.tensor(tokens)).logits).mean().backward()
    for i, layer in enumerate(theirs.model.layers):
        q = layer.self_attn.q_proj.weight.grad.numpy().T
        np.testing.assert_allclose(got["self_attn"]["q_proj"]["kernel"][i], q, atol=1e-6, rtol=1e-3)
        norm = layer.post_attention_layernorm.weight.grad.numpy()
        np.testing.assert_allclose(
            got["post_attention_layernorm"]["scale"][i], norm, atol=1e-6, rtol=1e-3
        )
        if ours.config.qk_norm:
            norm = layer.self_attn.k_norm.weight.grad.numpy()
            np.testing.assert_allclose(
                got["self_attn"]["k_norm"]["scale"][i], norm, atol=1e-6, rtol=1e-3
            )


def _small(**changes) -> ModelConfig:
    config = ModelConfig(
        model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=4,
        num_heads=4, num_kv_heads=2, head_dim=8, query_scale=8**-0.5,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


@functools.cache
def _model(config: ModelConfig):
    return models.random_model(config, jax.random.key(0), stddev=0.2)


@dataclasses.dataclass
class _Factors:
    """Stands for an adapter: what ``apply`` reads of one."""

    layers: dict
    scale: float


def test_adapter_equals_merged_weights():
    ours = _model(_small(num_layers=2))
    rng = np.random.default_rng(1)
    layers, merged = {}, jax.tree.map(lambda x: x, ours.weights)
    for block, name in (("self_attn", "q_proj"), ("self_attn", "o_proj"), ("mlp", "down_proj")):
        kernel = ours.weights["layers"][block][name]["kernel"]
        a = rng.normal(size=(kernel.shape[0], kernel.shape[1], 3)).astype(np.float32)
        b = rng.normal(size=(kernel.shape[0], 3, kernel.shape[2])).astype(np.float32)
        layers.setdefault(block, {})[name] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
        merged["layers"][block][name]["kernel"] = kernel + 0.25 * np.einsum("lir,lro->lio", a, b)
    tokens = jnp.asarray(_tokens(2, 9) % 64)
    adapted = jax.jit(lambda w, f: ours.apply(w, _Factors(f, 0.25), tokens)[0])
    bare = jax.jit(lambda w: ours.apply(w, None, tokens)[0])
    want = np.asarray(bare(merged))
    np.testing.assert_allclose(adapted(ours.weights, layers), want, atol=2e-4, rtol=0)
    assert np.abs(want - np.asarray(bare(ours.weights))).max() > 0.1


def test_all_masked_rows_are_finite_in_value_and_gradient():
    ours = _model(_small(attention_softcap=5.0))
    tokens = jnp.asarray(_tokens(2, 6) % 64)
    valid = jnp.asarray([[False] * 6, [False] * 2 + [True] * 4])

    def loss(weights):
        return jnp.sum(ours.apply(weights, None, tokens, valid=valid)[0] ** 2)

    value, grads = jax.jit(jax.value_and_grad(loss))(ours.weights)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_padding_tokens_do_not_matter():
    ours = _model(_small(windows=(3, 0, 3, 0)))
    tokens = _tokens(2, 9) % 64
    valid = np.ones((2, 9), bool)
    valid[0, :4] = False
    other = tokens.copy()
    other[0, :4] = 1
    got = [_apply(ours)(ours.weights, jnp.asarray(t), jnp.asarray(valid)) for t in (tokens, other)]
    np.testing.assert_array_equal(np.asarray(got[0])[valid], np.asarray(got[1])[valid])


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_number(remat):
    tokens = jnp.asarray(_tokens(2, 9) % 64)
    plain = _model(_small(num_layers=2))
    grads = []
    for how in ("none", remat):
        graphdef, _ = models.abstract_model(plain.config, "float32", how)
        ours = dataclasses.replace(plain, graphdef=graphdef)
        loss = lambda w, m=ours: jnp.sum(m.apply(w, None, tokens)[0] ** 2)  # noqa: E731
        grads.append(jax.jit(jax.grad(loss))(ours.weights))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *grads)
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(ours.weights))
    assert ("remat" in jaxpr) or ("checkpoint" in jaxpr)


@pytest.mark.parametrize("family", ["llama3.1", "gemma2"])
def test_bfloat16_compute_is_close_and_logits_are_float32(family, tmp_path):
    theirs = build(family)
    low = models.load(save(theirs, tmp_path / family), dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(low.weights)} == {"bfloat16"}
    tokens = _tokens(2, 9)
    got = _apply(low)(low.weights, jnp.asarray(tokens), jnp.ones(tokens.shape, bool))
    want = _their_logits(theirs, tokens, np.ones(tokens.shape, bool))
    assert got.dtype == jnp.float32
    error = np.abs(np.asarray(got) - want)
    assert error.mean() < 0.02 * np.abs(want).max()


def test_weights_may_be_kept_in_another_dtype(tmp_path):
    mixed = models.load(
        save(build("llama2"), tmp_path / "m"), dtype="bfloat16", weights_dtype="float32"
    )
    assert {x.dtype.name for x in jax.tree.leaves(mixed.weights)} == {"float32"}
    assert mixed.dtype == jnp.bfloat16


def test_size_formulas(pair):
    theirs, ours = pair
    leaves = jax.tree.leaves(ours.weights)
    assert ours.config.num_parameters() == sum(x.size for x in leaves) == theirs.num_parameters()


def _equations(jaxpr) -> int:
    inner = [v for e in jaxpr.eqns for v in e.params.values()]
    return len(jaxpr.eqns) + sum(_equations(v.jaxpr) for v in inner if hasattr(v, "jaxpr"))


def test_program_does_not_grow_with_depth():
    sizes = []
    for layers in (4, 16, 32):
        config = _small(num_layers=layers)
        graphdef, _ = models.abstract_model(config, "float32", "full")
        ours = dataclasses.replace(_model(config), graphdef=graphdef)
        tokens = jnp.zeros((2, 8), jnp.int32)
        loss = lambda w, m=ours: jnp.sum(m.apply(w, None, tokens)[0])  # noqa: E731, B023
        sizes.append(_equations(jax.make_jaxpr(jax.grad(loss))(ours.weights).jaxpr))
    assert sizes[0] == sizes[1] == sizes[2] > 50


def test_flops_match_xla_without_scan():
    """One layer: XLA's own count of the compiled forward pass, to a few per cent."""
    config = _small(num_layers=1, vocab_size=256, hidden_size=64, intermediate_size=256)
    ours = models.random_model(config, jax.random.key(0))
    length = 32
    compiled = jax.jit(lambda w, t: ours.apply(w, None, t)[0]).lower(
        ours.weights, jnp.zeros((1, length), jnp.int32)
    )
    counted = compiled.compile().cost_analysis()["flops"]
    # XLA computes masked scores as well: all keys, not the visible half.
    full = 2 * config.matmul_parameters() + 4 * length * config.num_heads * config.head_dim
    assert counted == pytest.approx(full * length, rel=0.15)
    assert config.flops_per_token(length) < full
    windowed = dataclasses.replace(config, windows=(4,))
    assert windowed.flops_per_token(length) < config.flops_per_token(length)
    visible = sum(min(i + 1, 4) for i in range(length)) / length
    want = 2 * config.matmul_parameters() + 4 * visible * config.num_heads * config.head_dim
    assert windowed.flops_per_token(length) == pytest.approx(want)


def test_sharded_over_a_mesh_equals_one_device(tmp_path):
    code = """
import jax, numpy as np, sys
from panacea_jax.models import model as models
from panacea_jax.models.bound import Inputs
from panacea_jax.parallel import make_mesh
tokens = np.random.default_rng(0).integers(0, 96, (4, 9)).astype(np.int32)
for folder in sys.argv[1:]:
    outs = []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(data=1, fsdp=2, tensor=2)):
        m = models.load(folder, mesh=mesh, dtype="float32")
        kernel = m.weights["layers"]["self_attn"]["q_proj"]["kernel"]
        print(len({str(s.index) for s in kernel.addressable_shards}))
        outs.append(np.asarray(jax.jit(lambda w, t: m.apply(w, None, t)[0])(m.weights, tokens)))
        jax.tree.map(lambda x: x.block_until_ready(), m.weights)
        flat = [np.asarray(x) for x in jax.tree.leaves(m.weights)]
        outs.append(flat)
    np.testing.assert_allclose(outs[0], outs[2], atol=1e-5)
    for a, b in zip(outs[1], outs[3]):
        np.testing.assert_array_equal(a, b)
"""
    folders = [str(save(build(f), tmp_path / f)) for f in ("gemma2", "qwen3", "gemma3")]
    env = {"XLA_FLAGS": xla_flags(4)}
    assert _python(code, *folders, env=env).split() == ["1", "4"] * 3


def test_float64_throughout(tmp_path):
    code = """
import jax, numpy as np, sys, torch
from panacea_jax.models import model as models
from panacea_jax.models.bound import Inputs
m = models.load(sys.argv[1], dtype="float64")
tokens = np.random.default_rng(0).integers(0, 96, (2, 9))
jaxpr = jax.make_jaxpr(lambda w: m.apply(w, None, jax.numpy.asarray(tokens))[0])(m.weights)
text = str(jaxpr)
assert "f32" not in text and "bf16" not in text, [l for l in text.splitlines() if "f32" in l][:5]
apply = lambda m: jax.jit(lambda w: m.apply(w, None, jax.numpy.asarray(tokens))[0])(m.weights)
out = apply(m)
assert out.dtype == jax.numpy.float64
single = models.load(sys.argv[1], dtype="float32")
error = np.abs(np.asarray(apply(single)) - np.asarray(out))
assert 0 < error.max() < 1e-4
"""
    for family in ("gemma2", "llama3.1"):
        folder = save(build(family), tmp_path / family)
        _python(code, str(folder), env={"JAX_ENABLE_X64": "1"})


def _python(code, *args, env=None):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("setting", "value"),
    [("dtype", "int8"), ("dtype", "float64"), ("remat", "some"), ("attention", "cudnn")],
)
def test_bad_settings(setting, value):
    with pytest.raises(InputError, match=f"config.model.{setting} = {value}"):
        models.random_model(_small(), jax.random.key(0), **{setting: value})


def test_init_is_like_transformers():
    ours = models.random_model(_small(qkv_bias=True, hidden_size=64), jax.random.key(0))
    layers = ours.weights["layers"]
    assert float(jnp.std(layers["mlp"]["up_proj"]["kernel"])) == pytest.approx(0.02, rel=0.05)
    assert float(jnp.abs(layers["self_attn"]["q_proj"]["bias"]).max()) == 0
    assert float(layers["input_layernorm"]["scale"].min()) == 1
    gemma = models.random_model(_small(unit_offset_norm=True), jax.random.key(0))
    assert float(jnp.abs(gemma.weights["norm"]["scale"]).max()) == 0
