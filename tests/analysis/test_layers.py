"""Layer coefficients against hand-made ε and the direct formula."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.analysis.layers import layer_coefficients, product_norm_change
from panacea_jax.errors import InputError
from panacea_jax.models.adapter import Adapter


def hand_made() -> dict[str, Any]:
    """Two layers. Layer 0: q has norm 5 (3 in a, 4 in b), down norm 12. Layer 1: q norm 0, down
    norm 6 + 8 → 10."""
    qa, qb = np.zeros((2, 4, 2)), np.zeros((2, 2, 3))
    da, db = np.zeros((2, 5, 2)), np.zeros((2, 2, 4))
    qa[0, 1, 1], qb[0, 0, 2] = 3, -4
    da[0] = 12 / math.sqrt(10)
    da[1, 0, 0], db[1, 1, 1] = 6, 8
    return {"self_attn": {"q_proj": {"a": qa, "b": qb}}, "mlp": {"down_proj": {"a": da, "b": db}}}


def random_adapter(seed: int, size: float = 1.0, layers: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def pair(d_in: int, d_out: int) -> dict[str, Any]:
        return {
            "a": size * rng.normal(size=(layers, d_in, 2)),
            "b": size * rng.normal(size=(layers, 2, d_out)),
        }

    return {
        "self_attn": {"q_proj": pair(7, 5), "v_proj": pair(7, 3)},
        "mlp": {"up_proj": pair(7, 11)},
    }


def test_exact_for_a_hand_made_epsilon() -> None:
    result = layer_coefficients(hand_made(), kind="mean")
    first, second = result["layers"]
    total, entries = 25 + 144 + 100, 4 * 2 + 2 * 3 + 5 * 2 + 2 * 4
    assert result["epsilon"] == "mean"
    assert result["outside"] is None
    assert [first["layer"], second["layer"]] == [0, 1]
    np.testing.assert_allclose([first["norm"], second["norm"]], [13, 10], rtol=1e-14)
    np.testing.assert_allclose(
        [first["share"], second["share"]], [169 / total, 100 / total], rtol=1e-14
    )
    np.testing.assert_allclose(first["density"], 13 / math.sqrt(entries), rtol=1e-14)
    np.testing.assert_allclose(first["modules"]["q_proj"]["norm"], 5, rtol=1e-14)
    np.testing.assert_allclose(first["modules"]["down_proj"]["share"], 144 / total, rtol=1e-14)
    assert second["modules"]["q_proj"] == {"norm": 0.0, "share": 0.0}
    assert first["effective"] is None
    assert list(first) == ["layer", "norm", "share", "density", "effective", "modules"]


def test_shares_sum_to_one_by_layer_and_by_module() -> None:
    rows = layer_coefficients(random_adapter(0))["layers"]
    assert math.isclose(sum(row["share"] for row in rows), 1, rel_tol=1e-14)
    for row in rows:
        assert list(row["modules"]) == ["q_proj", "v_proj", "up_proj"]
        assert math.isclose(
            sum(m["share"] for m in row["modules"].values()), row["share"], rel_tol=1e-12
        )


@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_effective_equals_the_direct_formula(size: float) -> None:
    w, e, s = random_adapter(1), random_adapter(2, size), 0.125
    expected = np.zeros(3)
    for block, name in (("self_attn", "q_proj"), ("self_attn", "v_proj"), ("mlp", "up_proj")):
        a, b, da, db = (x.astype(np.longdouble) for m in (w, e) for x in m[block][name].values())
        difference = (a + da) @ (
            b + db
        ) - a @ b  # extended precision, so that it is right for the tiny ε too
        expected += (s**2 * difference**2).sum((1, 2)).astype(np.float64)
    rows = layer_coefficients(e, w, s)["layers"]
    # What extended precision leaves of the cancellation at ε = 1e-9: 1e-19 / 1e-9.
    np.testing.assert_allclose(
        [r["effective"] for r in rows], np.sqrt(expected), rtol=1e-12 if size == 1 else 1e-9
    )


def test_effective_sees_what_the_norm_does_not() -> None:
    """Where a grows as b shrinks the product hardly moves, however large ε is."""
    a, b = np.ones((4, 1)), np.ones((1, 3))
    assert product_norm_change(a, b, a, -b / 2) < 1e-14
    assert math.isclose(product_norm_change(a, b, a, 0 * b), math.sqrt(12))


def test_equal_across_forms_and_dtypes() -> None:
    """Adapter, dict, and a weight tree with the same leaves under "layers"; numpy and jax, float32
    and bfloat16."""
    epsilon = random_adapter(3)
    e32 = {
        k: {m: {n: jnp.asarray(x, jnp.float32) for n, x in f.items()} for m, f in v.items()}
        for k, v in epsilon.items()
    }
    same = layer_coefficients(e32, e32, 0.5)
    assert (
        layer_coefficients(Adapter(e32, rank=2, alpha=1.0), Adapter(e32, rank=2, alpha=1.0)) == same
    )
    assert same["layers"][0]["effective"] is not None
    assert layer_coefficients({"layers": e32})["layers"] == layer_coefficients(e32)["layers"]
    np32 = {
        k: {m: {n: np.asarray(x) for n, x in f.items()} for m, f in v.items()}
        for k, v in e32.items()
    }
    assert layer_coefficients(np32, np32, 0.5) == same
    e16 = {
        "self_attn": {
            "q_proj": {
                "a": jnp.full((2, 3, 1), 0.5, jnp.bfloat16),
                "b": jnp.zeros((2, 1, 2), jnp.bfloat16),
            }
        }
    }
    np.testing.assert_allclose(
        layer_coefficients(e16)["layers"][1]["norm"], math.sqrt(0.75), rtol=1e-14
    )


def test_weight_tree_reports_the_rest_as_outside() -> None:
    tree = {
        "embed_tokens": {"embedding": np.full((3, 2), 2.0)},
        "layers": {
            "input_layernorm": {"scale": np.array([[3.0, 4.0], [0.0, 0.0]])},
            "self_attn": {"q_proj": {"kernel": np.full((2, 2, 2), 6.0), "bias": np.zeros((2, 2))}},
        },
        "norm": {"scale": np.array([1.0, 0.0])},
    }
    result = layer_coefficients(tree, tree, 1.0)
    assert result["outside"] == {
        "norm": 5.0,
        "modules": {"embed_tokens": {"norm": math.sqrt(24)}, "norm": {"norm": 1.0}},
    }
    first, second = result["layers"]
    assert (first["norm"], second["norm"]) == (13.0, 12.0)
    assert math.isclose(first["share"] + second["share"], 1)
    assert list(first["modules"]) == ["q_proj", "input_layernorm"]
    assert math.isclose(first["density"], 13 / math.sqrt(8))
    assert first["effective"] is None  # no adapter


def test_zero_epsilon_has_zero_shares() -> None:
    zero = {"self_attn": {"q_proj": {"a": np.zeros((2, 3, 1)), "b": np.zeros((2, 1, 3))}}}
    assert [row["share"] for row in layer_coefficients(zero)["layers"]] == [0.0, 0.0]


def test_bad_epsilon_is_named() -> None:
    good = hand_made()
    broken = hand_made()
    broken["self_attn"]["q_proj"]["a"][1, 0, 0] = np.nan
    with pytest.raises(InputError, match="q_proj holds NaN or inf in layer 1"):
        layer_coefficients(broken)
    uneven = {**good, "mlp": {"up_proj": {"a": np.zeros((3, 2, 2)), "b": np.zeros((3, 2, 2))}}}
    with pytest.raises(InputError, match=r"\[2, 3\]"):
        layer_coefficients(uneven)
    with pytest.raises(InputError, match="differ from those of the adapter"):
        layer_coefficients(good, random_adapter(0, layers=2), 1.0)
    with pytest.raises(InputError, match="no arrays"):
        layer_coefficients({})
    with pytest.raises(InputError, match="ndarray is no adapter"):
        layer_coefficients(np.zeros(3))
