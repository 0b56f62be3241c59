"""The loop: exact resume, few compilations, a NaN stop, SIGTERM, metrics."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from panacea_jax.data.batches import Stream
from panacea_jax.data.encode import Example
from panacea_jax.data.order import indices
from panacea_jax.defences import Loss, Panacea, Sft, panacea
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.perturbation import to_sphere
from panacea_jax.train.blame import Blame
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import learning_rate, make_optimizer
from panacea_jax.train.signals import Diverged, Preempted
from panacea_jax.train.watch import Profile, Watch
from tests.tiny import write_model

LADDER = (8, 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("tiny") / "base"), dtype="float32")


def examples(seed, n=24):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, 15, n)
    return [Example.answering(rng.integers(0, 40, k).astype(np.int32), 2) for k in sizes]


def streams():
    return {
        "user": Stream("user", examples(1), 4, 0, True, LADDER),
        "harmful": Stream("harmful", examples(2), 4, 0, True, LADDER, fixed_length=True),
    }


def start(model, full):
    if full:
        return full_parameters(model)
    adapter = lora.init(model, 2, 4, ("q", "v"), key=jax.random.key(0))
    return model, adapter


def run(model, full=False, defence=None, steps=8, **kwargs):
    bare, params = start(model, full)
    defence = defence or Panacea(rho=0.5, lam=0.3)
    return finetune(
        bare, params, defence, streams(), optimizer=make_optimizer(1e-2), steps=steps, **kwargs
    )


def assert_equal(a, b):
    leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    assert leaves
    for x, y in leaves:
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize(
    "defence",
    [Sft(), Panacea(rho=0.5, lam=0.3), Panacea(rho=0.5, lam=0.3, every=2)],
    ids=["sft", "panacea", "every2"],
)
def test_stop_and_resume_is_bit_for_bit(model, tmp_path, full, defence):
    whole = run(model, full, defence)
    part = run(model, full, defence, steps=5, checkpoints=Checkpoints(tmp_path / "c", every=2))
    assert part.steps == 5
    resumed = run(model, full, defence, steps=8, checkpoints=Checkpoints(tmp_path / "c", every=2))
    assert_equal(whole.params, resumed.params)
    if not isinstance(defence, Sft):
        assert_equal(whole.state, resumed.state)
    assert_equal(whole.deployed, resumed.deployed)


def test_the_deployed_weights_are_w_plus_epsilon_on_the_sphere(model):
    result = run(model, defence=Panacea(rho=0.5, lam=0.3))
    assert float(optax.tree.norm(result.epsilon)) == pytest.approx(0.5, rel=1e-6)
    assert_equal(result.deployed, jax.tree.map(jnp.add, result.params, result.epsilon))


def test_the_mean_epsilon_is_the_gradient_of_the_whole_set(model):
    """`final_epsilon="mean"` equals ε of one batch that holds every harmful record."""
    result = run(model, defence=Panacea(rho=0.5, lam=0.3, final_epsilon="mean"))
    everything = Stream("harmful", examples(2), 24, 0, False, LADDER, fixed_length=True).batch(0)
    everything = jax.tree.map(jnp.asarray, everything)
    h = jax.grad(Loss.of(model))(result.params, everything)
    expected, _ = to_sphere(0.5).update(h, optax.EmptyState())
    for a, b in zip(jax.tree.leaves(result.epsilon), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_metrics_say_the_learning_rate_of_each_step(model, tmp_path):
    """Of the update that was made: the first one is that of step 0."""
    rate = learning_rate(1e-2, 8, "linear", 0.25)
    bare, params = start(model, False)
    finetune(bare, params, Sft(), streams(), optimizer=make_optimizer(rate), steps=8, folder=tmp_path,
             log_every=1, learning_rate=rate)  # fmt: skip
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line["learning_rate"] for line in lines]
    np.testing.assert_allclose(found, [0, 5e-3, *(1e-2 * k / 6 for k in range(6, 0, -1))], rtol=1e-6)


def test_a_profile_of_some_steps(model, tmp_path):
    """Two steps from the third on; a run that ends within them has its profile all the same."""
    run(model, steps=4, folder=tmp_path / "a", profile=Profile(3, 2))
    run(model, steps=4, folder=tmp_path / "b", profile=Profile(3, 9))
    for name in ("a", "b"):
        assert list((tmp_path / name / "profile").rglob("*.xplane.pb"))
    assert Profile.parse("20:5") == Profile(20, 5) and Profile.parse("") is None
    for text in ("20", "0:5", "a:b", "3:0", "1:2:3"):
        with pytest.raises(InputError, match="--profile="):
            Profile.parse(text)


def test_nothing_is_sent_to_the_devices_unasked(model, monkeypatch):
    """Within the loop only batches, which are put there on purpose, and what is read of metrics."""
    from panacea_jax.train import loop

    class Careless(Watch):
        def step(self, step, host, metrics, params):
            jnp.asarray(host["user"].tokens) + 1  # an implicit transfer
            super().step(step, host, metrics, params)

    monkeypatch.setattr(loop, "Watch", Careless)
    with pytest.raises(Exception, match=r"[Dd]isallowed"):
        run(model, steps=2)


def test_at_most_one_compilation_a_bucket(model):
    assert run(model).compilations <= len(LADDER)


def test_metrics_have_one_line_a_logged_step_also_after_a_resume(model, tmp_path):
    checkpoints = tmp_path / "c"
    run(model, steps=5, checkpoints=Checkpoints(checkpoints), folder=tmp_path, log_every=1)
    torn = tmp_path / "metrics.jsonl"
    torn.write_text(torn.read_text() + '{"step": 6, "lo')  # as a kill leaves it
    run(model, steps=8, checkpoints=Checkpoints(checkpoints), folder=tmp_path, log_every=1)
    rows = [json.loads(line) for line in torn.read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 9))
    wanted = {"loss", "harmful_loss", "harmful_loss_perturbed", "norm_g", "norm_h", "norm_difference", "norm_epsilon", "cos_gh",
              "term_ratio", "rho_displacement", "tokens_per_second"}  # fmt: skip
    assert wanted <= rows[-1].keys()
    assert rows[-1]["rho_displacement"] == pytest.approx(
        rows[-1]["norm_epsilon"] / rows[-1]["displacement"]
    )
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_nan_names_the_step_and_saves_nothing_after_it(model, tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", every=1)

    class Broken(Sft):
        def gradient(self, loss_fn, params, batches, state, key):
            loss, g = jax.value_and_grad(loss_fn)(params, batches["user"])
            count = state + 1
            loss = jnp.where(count == 4, jnp.nan, loss)
            return g, count, {"loss": loss}

        def init(self, params):
            return jnp.zeros((), jnp.int32)

    with pytest.raises(Diverged, match=f"step 4: the task loss is nan.*{taken(4)}; nothing was saved"):
        run(model, defence=Broken(), checkpoints=checkpoints)
    assert Checkpoints(tmp_path / "c").latest() == 3


def taken(step):
    """The records of a step of the stream "user", counted from 1."""
    return "records " + ", ".join(str(i + 1) for i in indices(0, "user", step - 1, 4, 24, True)) + " of user"


class Shaken(Sft):
    """SFT that shakes its loss and gradient at one step."""

    _at, _shake = 3, staticmethod(lambda loss, grads: (loss, grads))

    def gradient(self, loss_fn, params, batches, state, key):
        loss, grads = jax.value_and_grad(loss_fn)(params, batches["user"])
        shaken = self._shake(loss, grads)
        loss, grads = jax.tree.map(lambda x, y: jnp.where(state == self._at - 1, y, x), (loss, grads), shaken)
        return grads, state + 1, {"loss": loss}

    def init(self, params):
        return jnp.zeros((), jnp.int32)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_first_gradient_that_is_not_finite_is_named_before_its_weights_are_saved(model, tmp_path, full):
    """The loss is finite still; by the next step every weight would be NaN, since the norm of all gradients is."""

    class Torn(Shaken):
        @staticmethod
        def _shake(loss, grads):
            leaves, tree = jax.tree.flatten(grads)
            return loss, jax.tree.unflatten(tree, [x.at[0].set(jnp.nan if i in (1, 3) else x[0]) for i, x in enumerate(leaves)])

    second = "layers.input_layernorm.scale" if full else "layers.self_attn.q_proj.b"
    with pytest.raises(Diverged) as error:
        run(model, full=full, defence=Torn(), checkpoints=Checkpoints(tmp_path / "c", every=1))
    said = str(error.value)
    assert said.startswith("step 3: the weights are not finite after it (task loss ") and taken(3) in said
    assert f"the gradient of {second} is the first that is not finite, by name" in said
    assert Checkpoints(tmp_path / "c").latest() == 2


def test_a_base_that_is_not_finite_is_named_with_the_layer(model):
    kernel = model.weights["layers"]["mlp"]["up_proj"]["kernel"]
    layers = model.weights["layers"] | {"mlp": model.weights["layers"]["mlp"] | {"up_proj": {"kernel": kernel.at[1, 2, 3].set(jnp.nan)}}}
    broken = dataclasses.replace(model, weights=model.weights | {"layers": layers})
    with pytest.raises(Diverged, match=r"step 1: .* tensor layers\.mlp\.up_proj\.kernel \(layer 1\) of the base is not finite; records"):
        run(broken, defence=Sft())


def test_a_start_that_is_not_finite_is_named(model):
    _, params = start(model, False)
    broken = dataclasses.replace(params, layers=jax.tree.map(lambda x: x.at[0].set(jnp.inf), params.layers))
    with pytest.raises(Diverged, match=r"tensor layers\.self_attn\.q_proj\.a \(layer 0\) of the start of training"):
        finetune(model, broken, Sft(), streams(), optimizer=make_optimizer(1e-2), steps=2)


def test_an_id_beyond_the_vocabulary_is_the_first_to_blame(model):
    """Streams are refused for such ids; this is for who changes one on the way."""
    found = streams()
    number = found["user"].numbers(2)[0][1]
    found["user"].examples[number].tokens[3] = 70000
    cause = Blame(model, start(model, False)[1], Sft(), {"user": found["user"]}).cause(3, -1)
    assert cause == f"record {number + 1} of user has the token id 70000, beyond the vocabulary of {model.config.vocab_size}"


def test_a_spike_is_told_with_its_records(model, tmp_path):
    class Jumping(Shaken):
        _at, _shake = 23, staticmethod(lambda loss, grads: (loss + 9, grads))

    quiet = run(model, defence=Jumping(), steps=24, spike=0.0)
    result = run(model, defence=Jumping(), steps=24, folder=tmp_path, log_every=100)
    assert_equal(quiet.params, result.params)
    assert quiet.warnings == () and len(result.warnings) == 1
    assert result.warnings[0].startswith("step 23: the task loss jumped to ") and result.warnings[0].endswith(taken(23))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "spike" in row] == [23]


def test_sigterm_saves_and_the_restart_ends_bit_for_bit(model, tmp_path):
    whole = run(model)

    def kill(_):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="the state is saved"):
        run(model, checkpoints=Checkpoints(tmp_path / "c"), on_compile=kill)
    stopped = Checkpoints(tmp_path / "c").latest()
    assert stopped is not None and 0 < stopped < 8
    assert_equal(whole.params, run(model, checkpoints=Checkpoints(tmp_path / "c")).params)


def test_warnings_and_memory_survive_a_resume(model, tmp_path, monkeypatch):
    """The clamp is passed at the first step; a run that only finishes what was saved still says so, and does not say it again."""
    monkeypatch.setattr(panacea, "HARMFUL_LOSS_CLAMP", 0.5)
    whole = run(model)
    assert [line.partition(":")[0] for line in whole.warnings] == ["step 1"]
    for steps in (5, 8, 8):
        last = run(model, steps=steps, checkpoints=Checkpoints(tmp_path / "c"))
    assert last.warnings == whole.warnings and last.step_bytes == whole.step_bytes > 0


def test_parameters_that_are_given_away(model):
    """The same outcome, and nothing of the caller's tree is left to hold memory."""
    whole = run(model, full=True, steps=2)
    bare, params = start(model, True)
    given = jax.tree.map(jnp.copy, params)
    taken = finetune(
        bare, given, Panacea(rho=0.5, lam=0.3), streams(), optimizer=make_optimizer(1e-2), steps=2, donate=True
    )  # fmt: skip
    assert_equal(whole.deployed, taken.deployed)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))


def test_a_missing_stream_is_named(model):
    bare, params = start(model, False)
    with pytest.raises(KeyError, match="harmful"):
        finetune(
            bare,
            params,
            Panacea(),
            {"user": streams()["user"]},
            optimizer=make_optimizer(1e-2),
            steps=1,
        )


def test_the_callers_parameters_survive_donation(model):
    _, params = start(model, False)
    before = jax.tree.map(np.asarray, params)
    finetune(model, params, Sft(), streams(), optimizer=make_optimizer(1e-2), steps=2)
    assert_equal(before, params)
