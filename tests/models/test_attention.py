"""Attention against a plain loop in numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.generate.decode import GROWS
from panacea_jax.models import attention
from panacea_jax.models.cache import Slots, quantise_tokens


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attend_equals_a_loop(softcap):
    rng = np.random.default_rng(0)
    b, t, s, heads, kv_heads, dim = 2, 3, 5, 6, 2, 4
    q = rng.normal(size=(b, t, heads, dim))
    k, v = rng.normal(size=(2, b, kv_heads, s, dim))
    mask = rng.random((b, t, s)) < 0.6
    mask[:, :, 0] = True
    mask[1, 2] = False  # a padding query
    want = np.zeros_like(q)
    for i, j, h in np.ndindex(b, t, heads):
        scores = k[i, h // (heads // kv_heads)] @ q[i, j, h] * 0.7
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        p = np.where(mask[i, j], np.exp(scores), 0.0) if mask[i, j].any() else np.ones(s)
        want[i, j, h] = p / p.sum() @ v[i, h // (heads // kv_heads)]
    args = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    got = attention.attend(*args, jnp.asarray(mask), 0.7, softcap)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("cuts", [(0, 148), (0, 20, 148), (0, 20, 84, 148), (0, 1, 129, 148)])
def test_parts_equal_the_whole(cuts, softcap):
    """Blocks, an odd rest, and a first part that all rows share."""
    rng = np.random.default_rng(0)
    b, t, heads, kv_heads, dim = 3, 2, 4, 2, 8
    q = jnp.asarray(rng.normal(size=(b, t, heads, dim)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, b, kv_heads, cuts[-1], dim)), jnp.float32)
    if len(cuts) > 2:
        k, v = (x.at[:, :, : cuts[1]].set(x[:1, :, : cuts[1]]) for x in (k, v))
    mask = rng.random((b, t, cuts[-1])) < 0.6
    mask[:, :, 0] = True
    want = attention.attend(q, k, v, jnp.asarray(mask), 0.7, softcap)
    keys, values = ([Slots(x[:, :, i:j]) for i, j in itertools.pairwise(cuts)] for x in (k, v))
    if len(cuts) > 2:
        keys[0], values[0] = Slots(keys[0].x[:1]), Slots(values[0].x[:1])
    got = attention.attend_in_parts(q, keys, values, jnp.asarray(mask), 0.7, softcap)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("form", ["float32", "capped", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(8, 8, 8, 64), (64, 8, 8, 64), (4, 32, 32, 128), (64, 8, 2, 64)])
def test_empty_blocks_change_no_bit(shape, form):
    """From GROWS on: below, the compiler sums some sizes with other kernels than others."""
    b, heads, kv_heads, dim = shape
    assert b * kv_heads * dim * attention.SLOT_BLOCK >= GROWS
    dtype = "bfloat16" if form == "bfloat16" else "float32"
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(b, 1, heads, dim)), dtype)
    text = rng.normal(size=(2, b, kv_heads, 64, dim))
    recent = rng.normal(size=(2, b, kv_heads, 16, dim))

    def slots(x):
        x = jnp.asarray(x, dtype)
        return quantise_tokens(x) if form == "int8" else Slots(x)

    def result(size):
        mask = np.zeros((b, 1, size + 16), bool)
        mask[:, :, :40] = mask[:, :, size : size + 3] = True
        k, v = (
            np.concatenate([x, rng.normal(size=(b, kv_heads, size - 64, dim))], 2) for x in text
        )
        run = jax.jit(
            lambda keys, values: attention.attend_in_parts(
                q, keys, values, jnp.asarray(mask), 0.3, 5.0 if form == "capped" else None
            )
        )
        out = run([slots(k), slots(recent[0])], [slots(v), slots(recent[1])])
        return np.asarray(out.astype(jnp.float32)).tobytes()

    want = result(64)
    for size in (128, 192, 320):
        assert result(size) == want
