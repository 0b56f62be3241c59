"""Fresh adapters, target names, merging."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.adapter import Adapter, merge, target_names
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import random_model
from panacea_jax.worlds.base import LLAMA

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def model():
    return random_model(config_from_dict(LLAMA | SHAPE | {"vocab_size": 20}), jax.random.key(0))


@pytest.fixture(scope="module")
def fresh(model):
    return lora.init(model, 2, 8, ALL, key=jax.random.key(1))


@pytest.fixture(scope="module")
def logits(model):
    tokens = jnp.arange(7)[None] % 20
    forward = jax.jit(lambda weights, params: model.apply(weights, params, tokens)[0])
    return lambda params, weights=model.weights: np.asarray(forward(weights, params))


def test_a_fresh_adapter_has_the_shapes_of_its_projections(fresh):
    adapter = fresh
    shapes = {
        "q": (16, 16),
        "k": (16, 8),
        "v": (16, 8),
        "o": (16, 16),
        "gate": (16, 24),
        "up": (16, 24),
        "down": (24, 16),
    }
    assert (adapter.rank, adapter.alpha, adapter.scale, adapter.targets) == (2, 8.0, 4.0, ALL)
    for name, (d_in, d_out) in shapes.items():
        block = "mlp" if name in ("gate", "up", "down") else "self_attn"
        pair = adapter.layers[block][f"{name}_proj"]
        assert pair["a"].shape == (3, d_in, 2) and pair["b"].shape == (3, 2, d_out)
        assert pair["a"].dtype == pair["b"].dtype == jnp.float32
        assert not np.any(pair["b"])
        bound = 1 / np.sqrt(d_in)  # as peft: kaiming_uniform with a = √5
        assert 0.7 * bound < np.abs(pair["a"]).max() <= bound
        assert len(np.unique(np.asarray(pair["a"]))) == pair["a"].size, "layers or entries repeat"


def test_only_the_chosen_targets_and_a_function_of_the_key(model):
    a, b, c = (lora.init(model, 2, 4, ("v", "down_proj"), key=jax.random.key(k)) for k in (1, 1, 2))
    assert a.targets == ("v_proj", "down_proj") and len(jax.tree.leaves(a)) == 4
    for x, y, z in zip(*(jax.tree.leaves(t) for t in (a, b, c))):
        np.testing.assert_array_equal(x, y)
        assert not np.any(x) or np.any(x != z)


def test_a_fresh_adapter_changes_nothing(fresh, logits):
    np.testing.assert_allclose(logits(None), logits(fresh), atol=1e-7)


def test_target_names():
    assert target_names(("down", "q_proj", "q")) == ("q_proj", "down_proj")
    assert target_names(ALL[::-1]) == ALL
    for wrong in ((), ("q", "embed"), ("Q",), (3,)):
        with pytest.raises(InputError, match="config.lora.targets"):
            target_names(wrong)


def test_a_rank_is_at_least_one(model):
    with pytest.raises(InputError, match="config.lora.rank = 0"):
        lora.init(model, 0, 4, key=jax.random.key(0))


def test_the_adapter_is_a_pytree_whose_rank_and_alpha_are_static(fresh):
    adapter = fresh
    doubled = jax.jit(lambda t: jax.tree.map(lambda x: 2 * x, t))(adapter)
    assert isinstance(doubled, Adapter) and (doubled.rank, doubled.alpha) == (2, 8.0)
    np.testing.assert_array_equal(
        doubled.layers["self_attn"]["q_proj"]["a"], 2 * adapter.layers["self_attn"]["q_proj"]["a"]
    )


@pytest.fixture(scope="module")
def adapter(fresh):
    """Both factors away from zero, s = 1.5."""
    rng = np.random.default_rng(3)
    layers = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), fresh.layers
    )
    return Adapter(layers, rank=2, alpha=3.0)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_merge_is_summed_in_float32_and_then_cast(model, adapter, dtype):
    """Every entry within half a unit in the last place of the base's dtype from the sum in float64; other weights untouched."""
    weights = jax.tree.map(lambda x: x.astype(dtype), model.weights)
    layers = {
        "self_attn": {"k_proj": adapter.layers["self_attn"]["k_proj"]},
        "mlp": {"down_proj": adapter.layers["mlp"]["down_proj"]},
    }
    adapter = Adapter(layers, adapter.rank, adapter.alpha)
    merged = merge(weights, adapter)
    for block, name in (("self_attn", "k_proj"), ("mlp", "down_proj")):
        before, pair = (
            np.asarray(weights["layers"][block][name]["kernel"]),
            adapter.layers[block][name],
        )
        after = np.asarray(merged["layers"][block][name]["kernel"])
        assert after.dtype == dtype
        a, b = np.asarray(pair["a"], np.float64), np.asarray(pair["b"], np.float64)
        exact = before.astype(np.float64) + 1.5 * np.einsum("lir,lro->lio", a, b)
        assert np.all(
            np.abs(after.astype(np.float64) - exact)
            <= 0.501 * np.spacing(np.abs(after)).astype(np.float64) + 1e-6
        )
        assert np.any(after != before)
    same = jax.tree.map(
        lambda x, y: bool(np.array_equal(np.asarray(x), np.asarray(y))), weights, merged
    )
    changed = [path for path, equal in jax.tree_util.tree_leaves_with_path(same) if not equal]
    assert len(changed) == 2


def test_the_merged_model_computes_what_the_adapted_one_does(model, adapter, logits):
    """And merging leaves its arguments alone."""
    before = jax.tree.map(np.asarray, model.weights)
    merged = merge(model.weights, adapter)
    jax.tree.map(np.testing.assert_array_equal, before, model.weights)
    adapted = logits(adapter)
    np.testing.assert_allclose(adapted, logits(None, merged), atol=1e-4)
    assert np.abs(adapted - logits(None)).max() > 0.1
