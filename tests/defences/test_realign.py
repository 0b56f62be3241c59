"""Realignment is SFT on the mix: five steps equal PyTorch's; the mix keeps its ratio in every batch."""

import jax
import numpy as np
import pytest
import torch

from panacea_jax.config import get_config, make_defence
from panacea_jax.data.batches import Stream
from panacea_jax.data.encode import Example
from panacea_jax.data.mixing import realignment
from panacea_jax.data.sources import Record
from panacea_jax.defences import Realign
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.models.peft import adapter_tensors, save_adapter
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests import torch_oracle as oracle
from tests.families import VOCAB, build, save
from tests.tiny import write_model

STEPS, LR = 5, 1e-3


def records(name, count):
    return [Record(f"{name}{i}", "", "vix", "", {}) for i in range(count)]


def test_every_batch_has_the_ratio():
    refusals, benign = records("r", 30), records("b", 50)
    for ratio in (0.5, 0.1, 0.3, 0.75):
        mix = [r.instruction for r in realignment(refusals, benign, 200, ratio, 0, True)]
        assert len(mix) == 200
        for start in range(0, 200, 10):
            count = sum(name[0] == "b" for name in mix[start : start + 10])
            assert abs(count - 10 * ratio) < 1
    assert mix[:140] != [r.instruction for r in realignment(refusals, benign, 140, 0.75, 1, True)]


def test_each_kind_starts_again_when_it_is_exhausted():
    """In every pass each record once: shuffled anew, or in file order."""
    refusals, benign = records("r", 6), records("b", 20)
    for shuffle in (True, False):
        mix = [r.instruction for r in realignment(refusals, benign, 36, 0.5, 0, shuffle)]
        seen = [name for name in mix if name[0] == "r"]
        passes = [seen[i : i + 6] for i in range(0, 18, 6)]
        assert all(sorted(p) == [f"r{i}" for i in range(6)] for p in passes)
        assert (passes[0] == passes[1]) is not shuffle
        assert sorted(name for name in mix if name[0] == "b") == sorted(set(mix) - set(seen))


def test_a_kind_that_is_not_taken_may_be_empty():
    assert len(realignment(records("r", 3), [], 7, 0.0, 0, False)) == 7
    assert len(realignment([], records("b", 3), 7, 1.0, 0, False)) == 7


def examples():
    rng = np.random.default_rng(5)
    sizes = rng.integers(8, 30, 20)
    return [Example.answering(rng.integers(0, VOCAB, k).astype(np.int32), 3) for k in sizes]


def stream():
    return Stream("user", examples(), 4, 0, False, (32,))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_five_steps_equal_pytorch(dtype, tmp_path, monkeypatch):
    wide = dtype == "float64"
    if wide:
        oracle.use_float64_throughout(monkeypatch)
    with jax.enable_x64(wide):
        base = save(build("llama2", num_hidden_layers=2), tmp_path / "base")
        model = load(base, dtype=dtype)
        adapter = lora.init(model, 4, 8, ("q", "v"), key=jax.random.key(0), dtype=dtype)
        layers = jax.tree.map(
            lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype),
            adapter.layers,
        )
        adapter = lora.Adapter(layers, adapter.rank, adapter.alpha)
        save_adapter(adapter, tmp_path / "adapter", str(base))
        result = finetune(
            model, adapter, Realign(), {"user": stream()}, optimizer=make_optimizer(LR), steps=STEPS
        )
        theirs = oracle.load(base, tmp_path / "adapter", getattr(torch, dtype))
        batches = [(stream().batch(t), None) for t in range(STEPS)]
        oracle.train(theirs, batches, lr=LR, weight_decay=0.1)
        want = oracle.by_peft_name(oracle.trainable(theirs))
        ours, start = adapter_tensors(result.deployed), adapter_tensors(adapter)
        worst = max(np.linalg.norm(ours[n] - x) / np.linalg.norm(x) for n, x in want.items())
        assert worst < (1e-8 if wide else 1e-4)
        print(f"realign {dtype}: {worst:.1e}")
        assert min(np.linalg.norm(ours[n] - start[n]) for n in want) > 1e-3


@pytest.mark.parametrize("full", [False, True])
def test_resumes_bit_for_bit(full, tmp_path):
    model = load(write_model(tmp_path / "base"), dtype="float32")
    params = lora.init(model, 2, 4, ("q",), key=jax.random.key(0))
    if full:
        model, params = full_parameters(model)
    found = [Example.answering(e.tokens % 40, e.prompt_length) for e in examples()]

    def run(steps, checkpoints=None):
        streams = {"user": Stream("user", found, 4, 0, False, (32,))}
        return finetune(
            model, params, Realign(), streams,
            optimizer=make_optimizer(1e-2), steps=steps, checkpoints=checkpoints,
        ).deployed  # fmt: skip

    whole = run(6)
    run(3, Checkpoints(tmp_path / "c"))
    resumed = run(6, Checkpoints(tmp_path / "c"))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("key", "bad"), [("steps", 0), ("benign_ratio", 1.5)])
def test_impossible_values(key, bad):
    section = get_config().heal.defence
    section.name = "realign"
    section[key] = bad
    with pytest.raises(InputError, match=rf"config\.heal\.defence\.{key}"):
        make_defence(section, "heal.")
