"""SBR: five steps against PyTorch, what counts as a prompt and its end, prompts alone on the command line, limits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.cli.parsing import parse_command
from panacea_jax.config import make_defence
from panacea_jax.data.batches import Stream, pad
from panacea_jax.data.encode import Example
from panacea_jax.defences import Loss, Sbr, Sft
from panacea_jax.defences.sbr import prompt_ends
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.planning.abstract_step import stream_sizes
from panacea_jax.stages import lineage, room
from panacea_jax.stages.streams import stage_records
from panacea_jax.train.feeding import streams_of
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests import runs
from tests.defences import five_steps
from tests.defences.five_steps import (
    assert_equal_tensors,
    run,
    start_tensors,
    streams,
    torch_model,
    torch_steps,
)
from tests.defences.oracles import sbr as theirs
from tests.tiny import write_model

setting = five_steps.setting
KEY = jax.random.key(0)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_five_steps(setting, full):
    """Ours on a padded batch of whole harmful records, of which the first five count; theirs on their prompts alone."""
    *_, tolerance = setting
    ours, found = run(setting, Sbr(lam=2000.0, prompts=5), streams(), full)
    model = torch_model(setting, full)
    given = streams()
    grads = theirs.gradients(model, given["user"], given["harmful"].examples, five_steps.STEPS, lam=2000.0, count=5)
    torch_steps(model, lambda step: next(grads))
    assert_equal_tensors(found, model, start_tensors(setting, full), tolerance)
    start = theirs.ends(torch_model(setting, full), theirs.prompts_of(given["harmful"].examples, 5)).detach().numpy()
    np.testing.assert_allclose(ours.state.start, start, atol=10 * tolerance * np.abs(start).max())
    plain = run(setting, Sft(), streams(), full)[1]
    apart = max(np.linalg.norm(found[n] - x) / np.linalg.norm(x) for n, x in plain.items())
    print(f"apart from SFT by {apart:.1e}")
    assert apart > max(1e-3, 10 * tolerance) and ours.compilations == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("tiny") / "base"), dtype="float32")


@pytest.fixture(scope="module")
def adapters(model):
    """One to start from and one that has moved."""
    start = lora.init(model, 2, 4, ("q", "up"), key=KEY)
    return start, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(KEY, x.shape), start)


def texts(seed, n=9):
    rng = np.random.default_rng(seed)
    return [Example.answering(rng.integers(0, 40, k).astype(np.int32), int(rng.integers(1, 5))) for k in rng.integers(6, 15, n)]


def alone(example):
    """Its prompt."""
    ids = example.tokens[: int(example.loss_mask.argmax())]
    return Example(ids, np.zeros(len(ids), bool))


def on_device(examples, length=16, rows=None):
    return jax.tree.map(jnp.asarray, pad(examples, length, rows or len(examples)))


def test_the_end_of_a_prompt(model, adapters):
    """Of a record, of its prompt alone and of a batch of other padding: the same state, which is that of a row cut there."""
    loss, w = Loss.of(model), adapters[1]
    whole = prompt_ends(loss, w, on_device(texts(1)))
    for other in (on_device([alone(e) for e in texts(1)]), on_device(texts(1), 24, 11)):
        np.testing.assert_allclose(prompt_ends(loss, w, other)[:9], whole, atol=1e-5)
    for row, example in enumerate(texts(1)):
        ids = alone(example).tokens
        cut = loss.forward(w, on_device([alone(example)], len(ids))).hidden[0, -1]
        np.testing.assert_allclose(whole[row], cut, atol=1e-5)


@pytest.mark.parametrize("targets", [("q",), ("o",), ("gate",), ("down",), ("k", "o", "down")])
def test_the_width_of_an_adapter_is_the_models(targets, tmp_path):
    """Whatever is adapted; the model's MLP and its keys have other widths."""
    model = load(write_model(tmp_path / "base", hidden_size=64), dtype="float32")
    assert lora.init(model, 2, 4, targets, key=KEY).width == 64
    assert Sbr().init(lora.init(model, 2, 4, targets, key=KEY)).start.shape == (8, 64)
    assert Sbr(prompts=3).init(full_parameters(model)[1]).start.shape == (3, 64)


def gradient(model, adapters, defence, at_start=False, held=None):
    loss, (start, moved) = Loss.of(model), adapters
    batches = {"user": on_device(texts(2)), "harmful": on_device(texts(1)) if held is None else held}
    state = defence.init(start)
    if isinstance(defence, Sbr):
        state = defence.first_pass(loss, start, {"harmful": [batches["harmful"]]}, state)
    w = start if at_start else moved
    return jax.jit(lambda loss: defence.gradient(loss, w, batches, state, KEY))(loss)


def assert_close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=tolerance * float(jnp.abs(y).max()))


def test_limits_are_sft(model, adapters):
    """Without λ, and at the start, where the drift has its minimum; elsewhere not."""
    plain = gradient(model, adapters, Sft())[0]
    assert_close(gradient(model, adapters, Sbr(lam=0.0))[0], plain, 1e-6)
    found, _, metrics = gradient(model, adapters, Sbr())
    assert float(metrics["drift"]) > 1e-3
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain))) > 1e-2
    still, _, metrics = gradient(model, adapters, Sbr(), at_start=True)
    assert float(metrics["drift"]) < 1e-10
    assert_close(still, gradient(model, adapters, Sft(), at_start=True)[0], 1e-4)


def test_answers_and_padding_have_no_part(model, adapters):
    """Prompts alone, rows of padding and records behind the first K."""
    expected, _, metrics = gradient(model, adapters, Sbr(prompts=9))
    for held in (on_device([alone(e) for e in texts(1)], 16, 12), on_device(texts(1), 24)):
        found, _, again = gradient(model, adapters, Sbr(prompts=9), held=held)
        assert float(again["drift"]) == pytest.approx(float(metrics["drift"]), rel=1e-5)
        assert_close(found, expected)
    few, _, _ = gradient(model, adapters, Sbr(prompts=4))
    assert_close(few, gradient(model, adapters, Sbr(prompts=4), held=on_device(texts(1)[:4]))[0])


def given(seed=1, n=9, **settings):
    options = {"seed": 0, "shuffle": True, "buckets": (16,), **settings}
    return {"user": Stream("user", texts(2), 4, **options), "harmful": Stream("harmful", texts(seed, n), 3, **options)}


def test_every_step_sees_the_first_prompts_and_the_state_stays(model, adapters):
    """Whatever the order and the size of the stream's batches, packed or not."""
    first = streams_of(model, Sbr(prompts=5), given(packing=True))["harmful"]
    expected = pad(texts(1)[:5], 16, 5)
    for step in (0, 1, 7):
        jax.tree.map(np.testing.assert_array_equal, first.batch(step), expected)
    other = [*texts(1)[:5], *texts(8)[5:]]
    found = []
    for harmful in (texts(1), other, [alone(e) for e in texts(1)]):
        streams = given()
        streams["harmful"] = dataclasses.replace(streams["harmful"], examples=harmful)
        found.append(finetune(model, adapters[0], Sbr(prompts=5), streams, optimizer=make_optimizer(1e-2), steps=4))
    assert_close(found[1].params, found[0].params, 1e-9)
    assert_close(found[2].params, found[0].params, 1e-4)
    ends = prompt_ends(Loss.of(model), adapters[0], jax.tree.map(jnp.asarray, expected))
    np.testing.assert_allclose(found[0].state.start, ends, atol=1e-5)
    with pytest.raises(InputError, match="stream 'harmful': holds 4 records, and the first 5 are asked for"):
        streams_of(model, Sbr(prompts=5), given(n=4))


def test_bfloat16_is_finite(tmp_path):
    model = load(write_model(tmp_path / "base"), dtype="bfloat16")
    params = lora.init(model, 2, 4, ("q", "up"), key=KEY)
    found = finetune(model, params, Sbr(), given(), optimizer=make_optimizer(0.3), steps=4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.params)) and found.compilations == 1
    assert found.state.start.dtype == jnp.float32


@pytest.mark.parametrize(("key", "bad"), [("lam", -1.0), ("lam", float("nan")), ("lam", float("inf")), ("prompts", 0)])
def test_impossible_values_name_the_key(key, bad):
    with pytest.raises(InputError, match=rf"config\.defence\.{key} = "):
        Sbr(**{key: bad})


# ---------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return runs.make_place(tmp_path_factory.mktemp("sbr"))


def without_answers(place, name="prompts", more=""):
    """The harmful set's prompts, in a file that has nothing else."""
    rows = [json.loads(line) for line in (place.root / "harmful.jsonl").read_text().splitlines()]
    lines = [json.dumps({"instruction": row["instruction"] + more}) for row in rows]
    (place.root / f"{name}.jsonl").write_text("\n".join(lines))
    return f"--config.data.harmful=pairs@{place.root / name}.jsonl"


FLAGS = ("--config.defence.name=sbr", "--config.defence.prompts=4", "--config.data.packing=True")


def test_prompts_alone_do(place, tmp_path, capsys):
    """No answer is needed, and one that is there changes nothing; a method that reads answers refuses such a set."""
    bare = without_answers(place)
    adapters = []
    for name, more in (("with", ()), ("without", (bare,))):
        assert runs.panacea("finetune", *place.flags(*FLAGS, *more), f"--workdir={tmp_path / name}") == 0
        folder = tmp_path / name / "finetune"
        rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows[0]["drift"] < 1e-10 < rows[-1]["drift"]
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["outcome"]["records"] == {"user": 12, "harmful": 4}
        adapters.append((folder / "adapter/adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    capsys.readouterr()
    assert runs.panacea("doctor", *place.flags(*FLAGS, bare)) == 0
    assert runs.panacea("finetune", *place.flags(bare), f"--workdir={tmp_path / 'new'}") == 2
    assert "config.data.harmful" in capsys.readouterr().err


def refused(capsys, place, *flags):
    assert runs.panacea("finetune", *place.flags(*flags), f"--workdir={place.root / 'refused'}") == 2
    return capsys.readouterr().err


def test_what_cannot_be_used(place, capsys):
    """The place has 7 harmful records; the published 8 are wanted. A prompt that does not fit is not cut."""
    said = refused(capsys, place, "--config.defence.name=sbr")
    assert "config.data.harmful: 7 records, of which sbr at this setting wants the first 8" in said
    long = without_answers(place, "long", " w1" * 40)
    assert "record 1: its prompt has" in (said := refused(capsys, place, *FLAGS, long)) and "config.data.max_length=32" in said
    role = f"--config.data.harmful=pairs:harmful@{place.root / 'prompts'}.jsonl"
    assert "roles are for config.eval.tasks only" in refused(capsys, place, *FLAGS, role)
    assert "config.data.harmful is not set" in refused(capsys, place, *FLAGS, "--config.data.harmful=")


def test_its_batch_is_its_own(place):
    """``train.harmful_batch_size`` decides nothing: not the step that is planned, and it is no advice."""
    _, config = parse_command("finetune", place.flags(*FLAGS, "--config.train.harmful_batch_size=3"))
    defence = make_defence(config.defence)
    assert stage_records(config, "finetune", defence)["harmful"].batch_size == 4
    assert stream_sizes(config, defence) == {"user": 4, "harmful": 4}
    said = room.keys_of_training(config, lineage.named(config), defence)
    assert "config.train.batch_size" in said and "harmful" not in said
