"""Vaccine, random Vaccine and T-Vaccine equal PyTorch + peft + transformers with hooks; their limits, states and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from panacea_jax.data.batches import Stream
from panacea_jax.defences import Loss, RandomVaccine, Sft, TVaccine, Vaccine
from panacea_jax.defences.t_vaccine import draw_layers, importance, with_empty_row
from panacea_jax.errors import InputError
from panacea_jax.export import epsilon_tensors
from panacea_jax.models.full import full_parameters
from panacea_jax.models.peft import adapter_tensors
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from panacea_jax.train.step import init_state, make_step
from tests import torch_oracle as oracle
from tests.defences.oracles import vaccine as theirs
from tests.on_devices import on_devices
from tests.tiny import write_model
from tests.train.test_oracle import LR, assert_close, examples, setting

__all__ = ["setting"]
STEPS = 5


def streams():
    """One shape only: what is compared does not depend on it, and each costs a compilation."""
    return {
        "user": Stream("user", examples(1), 4, 0, False, (32,), fixed_length=True),
        "harmful": Stream("harmful", examples(2), 2, 0, False, (32,), fixed_length=True),
    }


def run(model, params, defence, steps=STEPS, **kwargs):
    optimizer = make_optimizer(LR, partial=defence.partial)
    return finetune(model, params, defence, streams(), optimizer=optimizer, steps=steps, **kwargs)


def start(setting, full):
    """Our model and parameters, and theirs."""
    model, adapter, (base, folder), _ = setting
    dtype = getattr(torch, str(model.dtype))
    if full:
        return *full_parameters(model), oracle.load_full(base, dtype)
    return model, adapter, oracle.load(base, folder, dtype)


def batches(interval=1):
    return [(streams()["user"].batch(t), streams()["harmful"].batch(t // interval)) for t in range(STEPS)]  # fmt: skip


def assert_same(params, model, full, tolerance):
    ours = (epsilon_tensors if full else adapter_tensors)(params)
    assert_close(ours, oracle.by_peft_name(oracle.trainable(model)), tolerance)


def step_key(t):
    return jax.random.fold_in(jax.random.key(0), t)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_vaccine(setting, full):
    model, params, torchs = start(setting, full)
    ours = run(model, params, Vaccine(rho=0.7))
    theirs.vaccine(torchs, batches(), 0.7)
    assert_same(ours.params, torchs, full, setting[-1])


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_random_vaccine(setting, full):
    model, params, torchs = start(setting, full)
    ours = run(model, params, RandomVaccine(rho=0.04))

    def noise(t):
        shape = (
            model.config.num_layers,
            *streams()["user"].batch(t).tokens.shape,
            model.config.hidden_size,
        )
        return 0.2 * jax.random.normal(step_key(t), shape, model.dtype)  # 0.04 is a variance

    theirs.random_vaccine(torchs, batches(), noise)
    assert_same(ours.params, torchs, full, setting[-1])


@pytest.mark.parametrize(
    ("full", "freeze", "average"),
    [(False, "attention", "none"), (False, "layer", "mean"), (True, "attention", "none")],
)
def test_t_vaccine(setting, full, freeze, average):
    """J = 2 and K = 3 in five steps: the importance is looked at twice, the layers are drawn three times."""
    model, params, torchs = start(setting, full)
    defence = TVaccine(rho=0.7, layers=1, interval=2, importance_interval=3, importance_average=average, freeze=freeze)  # fmt: skip
    ours = run(model, params, defence)

    def drawn(t, p):
        return np.asarray(draw_layers(step_key(t), jnp.asarray(p), 1)).tolist()

    seen = theirs.t_vaccine(torchs, batches(3), 0.7, 2, 3, drawn, average == "mean", freeze == "layer")  # fmt: skip
    assert len({tuple(active) for _, active in seen}) > 1  # else a fixed layer would pass
    assert np.abs(seen[0][0] - seen[-1][0]).max() > 1e-3
    np.testing.assert_allclose(ours.state.probabilities, seen[-1][0], rtol=10 * setting[-1])
    assert np.asarray(ours.state.active).tolist() == seen[-1][1]
    assert_same(ours.params, torchs, full, setting[-1])


def test_importance(setting):
    model, params, torchs = start(setting, False)
    batch = streams()["harmful"].batch(0)
    ours = jax.jit(importance)(Loss.of(model), params, jax.tree.map(jnp.asarray, batch))
    expected = theirs.probabilities(torchs, batch).detach().numpy()
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(ours, expected, rtol=setting[-1])
    beside = jax.jit(importance)(Loss.of(model), params, with_empty_row(jax.tree.map(jnp.asarray, batch)))  # fmt: skip
    np.testing.assert_allclose(beside, ours, rtol=setting[-1])


# What is compared with ourselves needs no second precision.
narrow = pytest.mark.parametrize("setting", ["float32"], indirect=True)


@pytest.mark.parametrize("setting", ["float64"], indirect=True)
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_radius_of_zero_is_sft(setting, full):
    """T-Vaccine also needs all layers to be active."""
    model, params, _ = start(setting, full)
    flat = epsilon_tensors if full else adapter_tensors
    sft = flat(run(model, params, Sft(), 3).params)
    for defence in (Vaccine(rho=0), RandomVaccine(rho=0), TVaccine(rho=0, layers=3)):
        assert_close(flat(run(model, params, defence, 3).params), sft, 1e-12)
    assert max(np.abs(x - sft[n]).max() for n, x in flat(params).items()) > LR


@pytest.mark.parametrize(
    "defence",
    [Vaccine(rho=0.7), RandomVaccine(rho=0.04), TVaccine(rho=0.7, layers=1, interval=2, importance_interval=5)],
    ids=["vaccine", "random_vaccine", "t_vaccine"],
)  # fmt: skip
@narrow
def test_stop_and_resume_is_bit_for_bit(setting, tmp_path, defence):
    """Step 3 goes on with the active layers drawn at step 2, step 4 draws with the importance of step 0."""
    model, params, _ = start(setting, False)
    whole = run(model, params, defence, 6)
    run(model, params, defence, 3, checkpoints=Checkpoints(tmp_path / "c"))
    resumed = run(model, params, defence, 6, checkpoints=Checkpoints(tmp_path / "c"))
    jax.tree.map(np.testing.assert_array_equal, (whole.params, whole.state), (resumed.params, resumed.state))  # fmt: skip


@narrow
def test_the_active_layers_change_in_one_compiled_step(setting):
    """And what is outside them does not move, moments included."""
    model, params, _ = start(setting, False)
    defence = TVaccine(rho=0.7, layers=1, interval=1, importance_interval=2)
    optimizer = make_optimizer(LR, partial=True)
    state = init_state(params, defence, optimizer)
    step = make_step(model, defence, optimizer, jax.tree.map(lambda x: x.sharding, state))
    batch = {name: jax.tree.map(jnp.asarray, s.batch(0)) for name, s in streams().items()}
    drawn = []
    for _ in range(6):
        before = jax.tree.map(np.array, state)
        state, _ = step(
            state, model.weights, batch, jax.device_put(jax.random.key(0), state.step.sharding)
        )
        [active] = np.asarray(state.defence_state.active)
        drawn.append(active)

        def moved(tree, old):
            """Of each leaf, which rows of its first axis changed."""
            pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(old), strict=True)
            return [np.any(np.asarray(x) != y, axis=tuple(range(1, y.ndim))) for x, y in pairs]

        adam, adam_before = state.opt_state[1], before.opt_state[1]
        for part, old in ((state.params, before.params), (adam.mu, adam_before.mu), (adam.count, adam_before.count)):  # fmt: skip
            for rows in moved(part.layers["self_attn"], old.layers["self_attn"]):
                assert np.flatnonzero(rows).tolist() == [active]
            assert all(rows.all() for rows in moved(part.layers["mlp"], old.layers["mlp"]))
    assert len(set(drawn)) > 1
    assert step._cache_size() == 1


@narrow
def test_more_active_layers_than_there_are(setting):
    model, params, _ = start(setting, False)
    with pytest.raises(InputError, match=r"config\.defence\.layers = 8: the model has 3"):
        run(model, params, TVaccine())


@narrow
def test_an_optimizer_that_cannot_leave_layers_out_is_refused(setting):
    model, params, _ = start(setting, False)
    with pytest.raises(ValueError, match="partial=True"):
        finetune(
            model, params, TVaccine(layers=1), streams(), optimizer=make_optimizer(LR), steps=1
        )


@pytest.mark.parametrize("kind", [Vaccine, RandomVaccine, TVaccine])
@pytest.mark.parametrize("rho", [-1.0, float("inf"), float("nan")])
def test_impossible_radius(kind, rho):
    with pytest.raises(InputError, match=r"config\.defence\.rho"):
        kind(rho=rho)


@pytest.mark.parametrize(
    ("key", "bad"),
    [("layers", 0), ("interval", 0), ("importance_interval", 0), ("importance_average", "median"), ("freeze", "mlp")],
)  # fmt: skip
def test_impossible_values_name_the_key(key, bad):
    with pytest.raises((InputError, TypeError), match=rf"config\.defence\.{key}|{key}"):
        TVaccine(**{key: bad})


def test_eight_devices_train_what_one_does(tmp_path):
    """Mesh fsdp 4 × tensor 2."""
    folder = write_model(tmp_path / "base")
    found = on_devices("tests.defences.sharded_vaccines", folder)
    assert found.pop("devices") == 8 and len(found) == 3
    for name, result in found.items():
        assert result["error"] < 1e-5 and result["moved"] > 1e-2, name
        assert result["active"][0] == result["active"][1], name
