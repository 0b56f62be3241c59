"""What is drawn follows the exact distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.generate.sample import Sampling, first_largest, next_token, row_keys, truncated

LOGITS = np.log(np.asarray([0.4, 0.05, 0.25, 0.05, 0.2, 0.05], np.float32)) + 3


def _exact(temperature, top_p):
    """The definition, token by token from the most likely on."""
    p = np.exp((LOGITS - LOGITS.max()) / temperature)
    p /= p.sum()
    kept, total = np.zeros_like(p), 0.0
    for i in np.argsort(-p, kind="stable"):
        if total >= top_p:
            break
        kept[i], total = p[i], total + p[i]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.5), (1.5, 0.7), (1.0, 0.01), (2, 1)]
)
def test_frequencies(temperature, top_p):
    n = 20_000
    logits = jnp.broadcast_to(LOGITS, (n, len(LOGITS)))
    keys = row_keys(3, jnp.arange(n))
    drawn = jax.jit(next_token, static_argnums=3)(
        logits, keys, jnp.full(n, 7), Sampling(temperature, top_p)
    )
    want = _exact(temperature, top_p)
    got = np.bincount(drawn, minlength=len(LOGITS)) / n
    assert (got[want == 0] == 0).all()
    np.testing.assert_allclose(got, want, atol=4 * np.sqrt(0.25 / n))


def test_equal_logits_stay_together():
    kept = np.isfinite(truncated(jnp.asarray(LOGITS)[None], 1.0, 0.87))[0]
    assert kept.tolist() == [True] * 6  # 0.85 is not enough, and the three rarest are equals
    kept = np.isfinite(truncated(jnp.asarray(LOGITS)[None], 1.0, 0.84))[0]
    assert kept.tolist() == [True, False, True, False, True, False]


def test_a_draw_changes_with_prompt_position_and_seed_but_not_with_the_row():
    logits = jnp.zeros((4, 1000))
    how = Sampling(1.0)

    def draw(seed, indices, position):
        indices, position = jnp.asarray(indices), jnp.asarray(position)
        return next_token(logits, row_keys(seed, indices), position, how).tolist()

    first = draw(0, [0, 1, 2, 3], [5, 5, 5, 5])
    assert len(set(first)) == 4
    assert draw(0, [3, 2, 1, 0], [5, 5, 5, 5]) == first[::-1]
    assert not set(draw(0, [0, 0, 0, 0], [6, 7, 8, 9])) & set(first)
    assert draw(1, [0, 1, 2, 3], [5, 5, 5, 5]) != first


def test_temperature_zero_is_greedy():
    logits = jnp.asarray(LOGITS)[None]
    assert next_token(
        logits, row_keys(0, jnp.zeros(1, jnp.int32)), jnp.zeros(1, jnp.int32), Sampling()
    ).tolist() == [0]


def test_first_largest_is_argmax():
    logits = np.random.default_rng(0).integers(-3, 3, (50, 40)).astype(np.float32)  # with ties
    np.testing.assert_array_equal(first_largest(jnp.asarray(logits)), logits.argmax(-1))
    assert first_largest(jnp.full((1, 5), jnp.nan)).tolist() == [4]  # a number of the vocabulary
