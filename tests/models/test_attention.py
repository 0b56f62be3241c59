"""Attention against a plain loop in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.errors import InputError
from panacea_jax.models import attention
from panacea_jax.models.config import ModelConfig


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


def test_resolve():
    config = ModelConfig("llama", 8, 8, 8, 1, 1, 1, 8, 1.0)
    assert attention.resolve("auto", config) == attention.resolve("xla", config) == "xla"
    for name in ("cudnn", "splash"):
        with pytest.raises(InputError, match=f"config.model.attention = {name}: not available"):
            attention.resolve(name, config)
    with pytest.raises(InputError, match="flash: unknown; one of auto, xla"):
        attention.resolve("flash", config)
