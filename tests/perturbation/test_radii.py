"""Radii by layer: each rule by hand, always of one total."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from panacea_jax.errors import InputError
from panacea_jax.perturbation import LayerRule, norms, onto_ball, stacked_layers, to_sphere
from tests.perturbation.test_ball import tree

C = np.asarray([0.3, 0.1, 0.4, 0.2])


def by_hand(weights):
    total = sum(w * w for w in weights) ** 0.5
    return [w / total for w in weights]


@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        ("uniform", [1, 1, 1, 1]),
        ("proportional", [3, 1, 4, 2]),
        ("inverse", [1 / 3, 1, 1 / 4, 1 / 2]),
        ("top:1", [0, 0, 1, 0]),
        ("top:3", [1, 0, 1, 1]),
        ((1.0, 0.0, 0.0, 1.0), [1, 0, 0, 1]),
    ],
)
def test_each_rule(rule, weights):
    found = LayerRule(rule).unit(4, C)
    np.testing.assert_allclose(found, by_hand(weights), rtol=1e-12)
    dealt = LayerRule(rule, seed=3).unit(4, C)
    np.testing.assert_allclose(sorted(dealt), sorted(found), rtol=1e-12)
    assert np.linalg.norm(dealt) == pytest.approx(1)


def test_the_control_is_never_the_order_that_was():
    """numpy's first draw of four by seed 1 is 0, 1, 2, 3; two equal radii of four fall where they were by other seeds, too."""
    for seed in range(40):
        for rule in ("proportional", "top:2"):
            plain = LayerRule(rule).unit(4, C)
            dealt = LayerRule(rule, seed=seed).unit(4, C)
            assert not np.allclose(dealt, plain)
            np.testing.assert_allclose(np.sort(dealt), np.sort(plain))
    np.testing.assert_allclose(LayerRule("uniform", seed=1).unit(4, C), 0.5)


def test_the_control_is_another_order_by_seed():
    orders = {tuple(LayerRule("proportional", seed=seed).unit(4, C)) for seed in range(8)}
    assert len(orders) > 4
    again = LayerRule("proportional", seed=3).unit(4, C)
    np.testing.assert_array_equal(again, LayerRule("proportional", seed=3).unit(4, C))


def test_equal_coefficients_go_by_the_lower_layer():
    np.testing.assert_array_equal(LayerRule("top:1").unit(3, np.ones(3)), [1, 0, 0])


def test_the_sphere_and_the_ball_have_the_total():
    """‖ε‖ = ρ and ‖ε_l‖ = ρ_l, for a gradient of any shape."""
    rho, unit = 0.7, LayerRule((1.0, 2.0, 2.0)).unit(3)
    h = tree()
    epsilon, _ = to_sphere(rho * jnp.asarray(unit)).update(h, optax.EmptyState())
    np.testing.assert_allclose(norms(epsilon, per_layer=True), rho * np.asarray([1, 2, 2]) / 3, rtol=1e-5)
    np.testing.assert_allclose(norms(epsilon), rho, rtol=1e-5)
    kept, _ = onto_ball(rho * jnp.asarray(unit)).update(h, optax.EmptyState(), epsilon)
    assert stacked_layers(kept) == 3


def kinds(*named):
    return [{"epsilon": k, "layers": [{"layer": i, "norm": float(x)} for i, x in enumerate(c)]} for k, c in named]


@pytest.mark.parametrize(
    ("content", "weights"),
    [
        ([1, 2.5, 0, 3], [1, 2.5, 0, 3]),
        (kinds(("last", C))[0], C),
        (kinds(("last", C[::-1]), ("mean", C)), C),
        (kinds(("last", C)), C),
    ],
)
def test_a_file(content, weights, tmp_path):
    """A list, or layers.json with one ε or two; the mean counts."""
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(content))
    rule = LayerRule(str(file))
    assert rule.files == (str(file),) and not rule.probes
    np.testing.assert_allclose(rule.unit(4), by_hand(list(weights)))
    other = LayerRule("top:1", file=str(file))
    assert other.files == (str(file),) and not other.probes
    assert other.unit(4).argmax() == int(np.argmax(weights))


def test_what_looks_at_a_gradient():
    assert [LayerRule(r).probes for r in ("", "uniform", "proportional", "inverse", "top:2", (1.0,))] == [
        False, False, True, True, True, False,
    ]  # fmt: skip
    assert not LayerRule("") and LayerRule("uniform")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file: LayerRule("top:0"), "rho_per_layer = top:0: top:k with a whole number"),
        (lambda file: LayerRule("top:two"), "rho_per_layer = top:two: top:k with a whole number"),
        (lambda file: LayerRule("top:5").unit(4, C), "rho_per_layer = top:5: there are 4 layers"),
        (lambda file: LayerRule((1.0, 2.0)).unit(4), "2 values in (1.0, 2.0) for 4 layers"),
        (lambda file: LayerRule((0.0, 0.0)), "not all of them 0"),
        (lambda file: LayerRule((1.0, -1.0)), "finite numbers, 0 or more"),
        (lambda file: LayerRule(()), "finite numbers"),
        (lambda file: LayerRule("inverse").unit(2, np.asarray([1.0, 0.0])), "inverse: layer 1 has coefficient 0"),
        (lambda file: LayerRule("uniform", file=file), "config.defence.layer_file"),
        (lambda file: LayerRule("", seed=1), "config.defence.layer_seed = 1"),
        (lambda file: LayerRule("unifrom").check(), "unifrom: cannot be read (No such file or directory); there is uniform, proportional"),
        (lambda file: LayerRule("inverse", file="x.json").check(), "config.defence.layer_file = x.json: cannot be read (No such file"),
        (lambda file: LayerRule(file).check(), "neither a list of numbers nor a layers.json"),
        (lambda file: stacked_layers({"a": np.zeros((3, 2)), "b": np.zeros((5, 2))}), "is for adapters"),
    ],
)  # fmt: skip
def test_what_is_refused(make, said, tmp_path):
    file = tmp_path / "other.json"
    file.write_text('{"layers": 3}')
    with pytest.raises(InputError) as error:
        make(str(file))
    assert said in str(error.value) and "config.defence." in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2", "{}", "[]", '["a"]', "[[1]]", "3", "[1, NaN]", "null"])
def test_a_damaged_file(text, tmp_path):
    file = tmp_path / "layers.json"
    file.write_text(text)
    with pytest.raises(InputError, match="layers.json"):
        LayerRule(str(file)).check()
