"""More than one ascent step to find ε: projected onto the ball, from the closed form on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from panacea_jax.defences import Loss, Panacea
from panacea_jax.errors import InputError
from panacea_jax.perturbation import norms, to_sphere
from panacea_jax.train.checkpoints import Checkpoints
from tests.train.test_loop import assert_equal, model, run, start, streams

__all__ = ["model"]  # a fixture

RHO = 0.5


def found(model, defence):
    """(w, h at w, ε after each ascent step, in order)."""
    loss, (_, w) = Loss.of(model), start(model, False)
    batch = jax.tree.map(jnp.asarray, streams()["harmful"].batch(0))
    gradient = jax.jit(jax.grad(loss))
    seen = []

    def harmful_gradient(at, number):
        assert number == len(seen) + 1
        seen.append(jax.tree.map(jnp.subtract, at, w))
        return gradient(at, batch)

    h = gradient(w, batch)
    last = defence._ascend(w, h, harmful_gradient, defence._radius(w, defence.init(w)))
    return w, h, [*seen, last]


def test_one_step_is_the_closed_form_to_the_bit(model):
    w, h, [epsilon] = found(model, Panacea(rho=RHO))
    sphere = to_sphere(RHO)
    assert_equal(epsilon, sphere.update(h, sphere.init(w))[0])


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_epsilon_stays_in_the_ball_and_climbs(model, steps):
    """After each step; and the harmful loss there is no lower than at the closed form."""
    loss, batch = Loss.of(model), jax.tree.map(jnp.asarray, streams()["harmful"].batch(0))
    w, _, path = found(model, Panacea(rho=RHO, ascent_steps=steps))
    assert len(path) == steps
    assert all(float(optax.tree.norm(e)) <= RHO * (1 + 1e-6) for e in path)
    values = [float(loss(jax.tree.map(jnp.add, w, e), batch)) for e in (path[0], path[-1])]
    assert values[1] > values[0]


def test_one_radius_a_layer(model):
    radii = (0.1, 0.4)
    _, _, path = found(model, Panacea(rho=radii, ascent_steps=3))
    for epsilon in path:
        assert (np.asarray(norms(epsilon, per_layer=True)) <= np.array(radii) * (1 + 1e-6)).all()


def test_every_step_of_training_ends_in_the_ball(model, tmp_path):
    run(model, defence=Panacea(rho=RHO, lam=0.3, ascent_steps=3), folder=tmp_path, log_every=1)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert max(line["norm_epsilon"] for line in lines) <= RHO * (1 + 1e-6)


@pytest.mark.parametrize("final", ["last", "mean"])
def test_stop_and_resume_is_bit_for_bit(model, tmp_path, final):
    defence = Panacea(rho=RHO, lam=0.3, ascent_steps=3, final_epsilon=final)
    whole = run(model, defence=defence)
    run(model, defence=defence, steps=5, checkpoints=Checkpoints(tmp_path / "c", every=2))
    resumed = run(model, defence=defence, checkpoints=Checkpoints(tmp_path / "c", every=2))
    assert_equal((whole.params, whole.epsilon), (resumed.params, resumed.epsilon))


def test_what_it_costs():
    spec = Panacea(ascent_steps=3, every=2, final_epsilon="mean").streams["harmful"]
    assert (spec.passes, spec.whole_passes) == (2.0, 3.0)
    with pytest.raises(InputError, match=r"config\.defence\.ascent_steps = 0"):
        Panacea(ascent_steps=0)
