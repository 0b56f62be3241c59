"""Adapters of upper layers in training: the steps of the zero-filled adapter, with what enters computed before or not."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from panacea_jax.data.batches import Stream, pack
from panacea_jax.data.encode import Example
from panacea_jax.defences import Kl, Ldifs, Lisa, Loss, Panacea, RepNoise, Sft, TVaccine, Vaccine
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.train import entering
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests.models.test_some_layers import filled
from tests.runs import make_place, panacea
from tests.tiny import write_model
from tests.train.test_loop import assert_equal
from tests.train.test_packing import difference

DEPTH = 3


@pytest.fixture
def float64():
    """In every thread, since another one puts the batches on the device."""
    jax.config.update("jax_enable_x64", True)
    yield "float64"
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny") / "base", num_hidden_layers=DEPTH)


def streams(packing=False):
    def stream(name, seed):
        rng = np.random.default_rng(seed)
        texts = [Example.answering(rng.integers(0, 40, k).astype(np.int32), 2) for k in rng.integers(4, 15, 13)]
        return Stream(name, texts, 6, 0, True, (16, 32), row_multiple=2, packing=packing)

    return {name: stream(name, i) for i, name in enumerate(("user", "harmful", "alignment"))}


def adapter_of(model, layers):
    """Both factors away from zero, in the dtype of the model."""
    made = lora.init(model, 2, 4, ("q", "v"), key=jax.random.key(0), layers=layers, dtype=model.dtype)
    return dataclasses.replace(made, layers=jax.tree.map(lambda x: x + 0.02, made.layers))


def run(model, defence, params, cached=True, steps=5, packing=False, **more):
    return finetune(
        model, params, defence, streams(packing), optimizer=make_optimizer(1e-2), steps=steps,
        cache_frozen=cached, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    "defence",
    [Sft(), Panacea(rho=0.5, lam=0.3), Vaccine(rho=0.5), Kl(lam=1.0), Ldifs(rho=1e-3, gate=float("inf")),
     Lisa(rho=0.5, alignment_steps=1, finetune_steps=2, warmup_steps=1), RepNoise(alpha=0.5, beta=0.5, paired=False)],
    ids=lambda d: type(d).__name__,
)  # fmt: skip
def test_every_kind_of_method_takes_the_same_steps(folder, defence, float64):
    """A layer whose factors are all zero has no gradient and stays zero, so the adapter of all layers is an oracle. In float64."""
    model = load(folder, dtype=float64)
    some = adapter_of(model, "upper:1")
    whole = run(model, defence, filled(some, DEPTH))
    for cached in (True, False):
        found = run(model, defence, some, cached)
        assert found.deployed.numbers == (2,)
        assert difference(filled(found.deployed, DEPTH), whole.deployed) < (1e-7 if cached else 1e-9)
    assert difference(whole.deployed, filled(some, DEPTH)) > 1e-3


def test_what_is_kept(folder, monkeypatch):
    """Of streams whose records are seen twice or more, within the limit, for methods that it is enough for."""
    model = load(folder, dtype="float32")
    some, given = adapter_of(model, "upper:2"), streams()

    def kept(defence, steps, params=some):
        found = entering.with_entering(model, params, defence, {n: given[n] for n in ("user", *defence.streams)}, steps)  # fmt: skip
        return [name for name, s in found.items() if s.examples[0].entering is not None]

    assert kept(Panacea(), 5) == ["user", "harmful"]
    assert kept(Panacea(), 3) == ["harmful"]  # 18 of 13 records in one pass, in two passes 36
    assert kept(Vaccine(), 5) == kept(Sft(), 5, adapter_of(model, "0,2")) == kept(Sft(), 5, adapter_of(model, "")) == []
    monkeypatch.setattr(entering, "LIMIT", sum(len(e.tokens) for e in given["user"].examples) * 32 * 4)
    assert kept(Panacea(), 5) == ["user"]


def test_what_was_known_first_makes_room(folder, monkeypatch):
    model = load(folder, dtype="float32")
    some, given, known = adapter_of(model, "upper:2"), streams(), {}
    entering.with_entering(model, some, Sft(), {"user": given["user"]}, 5, known)
    first = list(known)
    asked = {e.tokens.tobytes(): len(e.tokens) for e in (given["harmful"].examples[i] for i in given["harmful"].taken(5))}
    size = sum(row.nbytes for row in known.values()) + sum(n for tokens, n in asked.items() if tokens not in known) * 32 * 4
    monkeypatch.setattr(entering, "LIMIT", size - 1)
    entering.with_entering(model, some, Sft(), {"user": given["harmful"]}, 5, known)
    assert set(first) | set(asked) == {first[0], *known} and first[0] not in known


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 2e-6), ("bfloat16", 2**-6)])
def test_it_is_what_enters(folder, dtype, rounding):
    """Padding aside: what transformers calls hidden state 1, in batches of other rows and packed."""
    model = load(folder, dtype=dtype)
    some = adapter_of(model, "upper:2")
    stream = streams()["user"]
    stream = entering.computed(model, some, stream, range(len(stream.examples)), {})
    for batch in (stream.batch(0), pack([stream.examples[:2], stream.examples[2:5]], 64, 2)):
        batch = jax.tree.map(jnp.asarray, batch)
        states, _ = Loss.of(model).hidden_states(some, batch._replace(entering=None))
        assert batch.entering.dtype == states.dtype == model.dtype
        found = jnp.where(batch.valid[..., None], batch.entering - states[1], 0)
        assert float(jnp.abs(found).max()) < rounding * float(jnp.abs(states[1]).max())


@pytest.mark.parametrize("more", [{}, {"accumulate": 2}, {"packing": True}], ids=str)
def test_in_micro_batches_and_packed(folder, more, float64):
    model = load(folder, dtype=float64)
    some, defence = adapter_of(model, "upper:1"), Panacea(rho=0.5, lam=0.3)
    plain = run(model, defence, some, cached=False)
    assert difference(run(model, defence, some, **more).deployed, plain.deployed) < 1e-7


def test_stop_and_resume_is_bit_for_bit(folder, tmp_path):
    model = load(folder, dtype="float32")
    some, defence = adapter_of(model, "upper:1"), Panacea(rho=0.5, lam=0.3)
    whole = run(model, defence, some)
    with pytest.MonkeyPatch.context() as patch:  # stopped after two steps of five
        patch.setattr(entering, "passes_of", lambda defence: {"user": 9, "harmful": 9})
        run(model, defence, some, steps=2, checkpoints=Checkpoints(tmp_path / "c"))
    resumed = run(model, defence, some, checkpoints=Checkpoints(tmp_path / "c"))
    assert_equal((whole.params, whole.state), (resumed.params, resumed.state))


def test_runs_share_what_they_know(folder):
    """To the bit what a run finds by itself, whatever was known of its records; only records that are taken are computed."""
    model = load(folder, dtype="float32")
    some, kept = adapter_of(model, "upper:1"), entering.Kept()
    alone = {n: run(model, Panacea(rho=0.5, lam=0.3), some, steps=n) for n in (1, 3)}
    for steps, known in ((1, 12), (3, 26)):
        found = run(model, Panacea(rho=0.5, lam=0.3), some, steps=steps, known=kept.of("base"))
        assert len(kept.of("base")) == known
        assert difference(found.deployed, alone[steps].deployed) < 1e-6
    again = run(model, Panacea(rho=0.5, lam=0.3), some, steps=3, known=kept.of("base"))
    fresh = run(model, Panacea(rho=0.5, lam=0.3), some, steps=3, known={})
    assert_equal((again.params, again.state), (found.params, found.state))
    assert_equal((again.params, again.state), (fresh.params, fresh.state))
    assert not kept.of("another")


def test_through_the_commands(tmp_path, capsys):
    """From the configuration to peft's file, layer coefficients with the right numbers, and what is refused."""
    place = make_place(tmp_path / "place")
    flags = [*place.flags("--config.lora.layers=upper:1"), f"--workdir={tmp_path / 'w'}"]
    assert panacea("finetune", *flags) == 0
    assert panacea("layers", flags[-1]) == 0
    out = tmp_path / "w" / "finetune"
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["layers_to_transform"] == [1]
    names = load_file(out / "adapter" / "adapter_model.safetensors")
    assert names and all(".layers.1." in name for name in names)
    coefficients = json.loads((tmp_path / "w" / "layers.json").read_text())
    assert [[row["layer"] for row in kind["layers"]] for kind in coefficients] == [[1], [1]]
    # From ε's file as well; and ε goes onto its own adapter only.
    assert panacea("layers", f"--epsilon={out / 'epsilon.safetensors'}") == 0
    assert [row["layer"] for row in json.loads((out / "layers.json").read_text())["layers"]] == [1]
    capsys.readouterr()
    for more, said in (
        (["--config.train.full_parameters=True"], "config.lora.layers = upper:1: layers of an adapter"),
        (["--config.lora.layers=2"], "the model has the layers 0 to 1"),
        ([f"--config.lora.init_from={out / 'adapter'}", "--config.lora.layers=0"], "adapts the layers 1"),
        (["--config.lora.layers=top"], "config.lora.layers = 'top'"),
    ):
        changed = {flag.partition("=")[0] for flag in more}
        kept = [flag for flag in flags[:-1] if flag.partition("=")[0] not in changed]
        assert panacea("finetune", *kept, *more, f"--workdir={tmp_path / 'x'}") == 2
        assert said in capsys.readouterr().err
    assert panacea("finetune", *place.flags(f"--config.lora.init_from={out / 'adapter'}"), f"--workdir={tmp_path / 'y'}") == 0  # fmt: skip


def test_t_vaccine_needs_all_layers(folder):
    model = load(folder, dtype="float32")
    with pytest.raises(InputError, match=r"config\.lora\.layers: t_vaccine"):
        TVaccine(layers=1).init(adapter_of(model, "upper:1"))
