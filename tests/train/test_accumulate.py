"""A batch in micro-batches is the whole batch: the same step of every method, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.config import get_config
from panacea_jax.data.batches import Stream
from panacea_jax.data.encode import Example
from panacea_jax.defences import DEFENCES, Defence, Loss, Panacea, RandomVaccine, RepNoise, Sft
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.parallel import make_mesh
from panacea_jax.planning.abstract_step import abstract_step
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from panacea_jax.train.step import make_step
from tests.planning.test_plan import TINY
from tests.runs import make_place, panacea
from tests.tiny import write_model
from tests.train.test_packing import METHODS, difference

EVERY = [*METHODS, RepNoise(alpha=0.5, beta=0.5), RandomVaccine(rho=0.01)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny") / "base")


def streams(defence):
    repeats = {name: spec.repeats for name, spec in defence.streams.items()}

    def stream(name, seed):
        """Lengths differ from row to row, so micro-batches differ in tokens."""
        rng = np.random.default_rng(seed)
        texts = [Example.answering(rng.integers(0, 40, k).astype(np.int32), 2) for k in rng.integers(4, 15, 21)]
        return Stream(name, texts, 6, 0, True, (16,), row_multiple=4, repeats=repeats.get(name, 1))  # fmt: skip

    return {name: stream(name, i) for i, name in enumerate(("user", "harmful", "alignment", "benign"))}


def run(folder, defence, accumulate, dtype="float64", full=False, steps=3):
    model = load(folder, dtype=dtype)
    if full:
        model, params = full_parameters(model)
    else:
        params = lora.init(model, 2, 4, ("q", "v"), key=jax.random.key(0), dtype=dtype)
        params = jax.tree.map(lambda x: x + 0.02, params)
    optimizer = make_optimizer(1e-2, partial=defence.partial)
    return finetune(model, params, defence, streams(defence), optimizer=optimizer, steps=steps,
                    accumulate=accumulate)  # fmt: skip


def test_every_method_with_steps_is_tried():
    with_steps = {kind for kind in DEFENCES.values() if issubclass(kind, Defence)}
    elsewhere = {DEFENCES["asft"]}  # which needs a model beside this one: defences/test_asft.py
    untried = {DEFENCES["realign"], DEFENCES["lox"]}  # whose gradient is SFT's
    assert {type(defence) for defence in EVERY} == with_steps - untried - elsewhere


@pytest.mark.parametrize("defence", EVERY, ids=lambda d: f"{type(d).__name__}-{EVERY.index(d)}")
def test_every_method_takes_the_same_steps(folder, defence):
    """Eight rows, two of them padding, in one, two and four parts. In float64: Adam makes 1e-3 of a rounding where a gradient is near 0."""
    with jax.enable_x64(True):
        whole, halves, quarters = (run(folder, defence, k) for k in (1, 2, 4))
        for parts in (halves, quarters):
            assert difference(parts.deployed, whole.deployed) < 1e-9
            assert parts.compilations == 1


@pytest.mark.parametrize("accumulate", [2, 4])
def test_the_gradient_in_float32(folder, accumulate):
    """By parameters and by offsets, of loss and hidden states."""
    model = load(folder, dtype="float32")
    params = lora.init(model, 2, 4, ("q", "v"), key=jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.02, params)
    batch = jax.tree.map(jnp.asarray, streams(Sft())["user"].batch(0))
    shape = (model.config.num_layers, *batch.tokens.shape, model.config.hidden_size)
    offsets = 0.1 * jax.random.normal(jax.random.key(1), shape)

    def value(loss, params, offsets, of_each=lambda x: x):
        states, read = loss.hidden_states(params, batch, ("mlp_out",))
        return loss(params, batch, offsets) + jnp.sum(of_each(jnp.sin(states))) + jnp.sum(read["mlp_out"] ** 2)

    gradient = jax.jit(jax.value_and_grad(value, argnums=(1, 2)))
    whole = gradient(Loss.of(model), params, offsets)
    parts = gradient(Loss.of(model, accumulate), params, offsets)
    # Thousands of terms of both signs: rounding goes with the sum of what is summed, not with what is left of it.
    terms = float(value(Loss.of(model), params, offsets, jnp.abs))
    assert float(parts[0]) == pytest.approx(float(whole[0]), abs=1e-7 * terms)
    # A few roundings of float32, by whatever compiler; that they are nothing else the tests in float64 show, to 1e-9.
    assert difference(parts[1][0], whole[1][0]) < 2e-6
    assert difference(parts[1][1], whole[1][1]) < 2e-6


def test_all_parameters(folder):
    defence = Panacea(rho=0.1, lam=0.3)
    with jax.enable_x64(True):
        whole, parts = (run(folder, defence, k, full=True) for k in (1, 4))
        assert difference(parts.deployed, whole.deployed) < 1e-9
        assert difference(parts.epsilon, whole.epsilon) < 1e-9


@pytest.mark.parametrize("name", ["sft", "panacea", "vaccine", "kl", "ldifs"])
def test_temporaries_fall_with_the_number_of_parts(name):
    """Of the compiled step at a shape whose activations outweigh its adapter."""
    config = get_config()
    config.defence.name, config.lora.rank, config.data.max_length = name, 2, 128
    config.model.dtype, config.train.batch_size, config.train.harmful_batch_size = "float32", 16, 16
    model = config_from_dict(TINY | {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 192})
    bytes_of = []
    for accumulate in (1, 2, 4):
        config.train.accumulate = accumulate
        step = abstract_step(config, model, make_mesh(devices=jax.devices()[:1]))
        program = make_step(step.model, step.defence, step.optimizer, step.shardings, accumulate)
        compiled = program.lower(step.state, step.weights, step.batches, step.key).compile()
        bytes_of.append(compiled.memory_analysis().temp_size_in_bytes)
    print(name, bytes_of)
    assert bytes_of[0] > 1.3 * bytes_of[1] > 1.3 * 1.3 * bytes_of[2]


def test_from_the_command_line(tmp_path):
    """Batches of 4 in 2 parts; the adapter is nearly that of one part, and what changed is in the manifest."""
    place = make_place(tmp_path / "place")
    from safetensors.numpy import load_file

    found = []
    for accumulate in (1, 2):
        out = tmp_path / str(accumulate)
        flags = place.flags(f"--config.train.accumulate={accumulate}", "--config.optimizer.learning_rate=1e-3")
        assert panacea("finetune", *flags, f"--workdir={out}") == 0
        found.append(load_file(out / "finetune" / "adapter" / "adapter_model.safetensors"))
    assert difference(found[1], found[0]) < 1e-4
    assert panacea("finetune", *place.flags("--config.train.accumulate=0"), f"--workdir={tmp_path / 'x'}") == 2


def test_rows_that_cannot_be_cut(folder):
    with pytest.raises(InputError, match=r"accumulate = 3: does not divide the 8 rows of stream 'user'"):
        run(folder, Sft(), 3, "float32")
