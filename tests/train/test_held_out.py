"""The held-out loss is the loss, and stopping by it survives a kill."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panacea_jax.data.batches import Stream
from panacea_jax.data.encode import Example
from panacea_jax.defences import Loss, Panacea, Sft
from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.held_out import HeldOut, sum_nll
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests.tiny import write_model

LADDER = (16,)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("tiny") / "base"), dtype="float32")


def examples(seed: int, n: int = 12) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [Example.answering(rng.integers(0, 40, k).astype(np.int32), 2) for k in rng.integers(5, 15, n)]


def run(model, folder: Path, *, every: int = 2, patience: int = 0, steps: int = 8, defence=None, rate: float = 1e-2, keep=True):
    streams = {
        "user": Stream("user", examples(1), 4, 0, True, LADDER),
        "harmful": Stream("harmful", examples(2), 4, 0, True, LADDER, fixed_length=True),
    }
    return finetune(
        model, lora.init(model, 2, 4, ("q", "v"), key=jax.random.key(0)), defence or Sft(), streams,
        optimizer=make_optimizer(rate), steps=steps, log_every=1, folder=folder,
        checkpoints=Checkpoints(folder / "checkpoints", every=1) if keep else None,
        held_out=HeldOut(examples(3, 6), 4, every, patience),
    )  # fmt: skip


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def looks(folder: Path) -> dict[int, float]:
    return {row["step"]: row["validation_loss"] for row in rows(folder) if "validation_loss" in row}


def test_it_is_the_mean_over_response_tokens_of_w(model, tmp_path):
    """Of Panacea's w too: as its task loss, without ε."""
    result = run(model, tmp_path, every=3, defence=Panacea(rho=0.5, lam=0.3))
    found = looks(tmp_path)
    assert list(found) == [3, 6, 8]  # and after the last step
    whole = Stream("all", examples(3, 6), 6, 0, False, LADDER).batch(0)
    expected = Loss.of(model)(result.params, jax.tree.map(jnp.asarray, whole))
    assert found[8] == pytest.approx(float(expected), rel=1e-6)
    total, tokens = sum_nll(model, result.params, examples(3, 6), 4)
    assert tokens == int(whole.loss_mask.sum()) and total / tokens == pytest.approx(found[8], rel=1e-6)
    # each look stands behind the metrics of its step
    steps = [row["step"] for row in rows(tmp_path)]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]


def test_looking_changes_no_step(model, tmp_path):
    bare = finetune(
        model, lora.init(model, 2, 4, ("q", "v"), key=jax.random.key(0)), Sft(), {"user": Stream("user", examples(1), 4, 0, True, LADDER)},
        optimizer=make_optimizer(1e-2), steps=8,
    )  # fmt: skip
    for a, b in zip(jax.tree.leaves(bare.params), jax.tree.leaves(run(model, tmp_path).params)):
        np.testing.assert_array_equal(a, b)


def test_it_stops_when_the_loss_has_not_fallen_for_some_looks(model, tmp_path):
    """A rate so high that the loss rises: nothing beats the first look, and after two more it is over."""
    result = run(model, tmp_path / "a", every=1, patience=2, rate=2.0, steps=20)
    found = looks(tmp_path / "a")
    values = list(found.values())
    best = int(np.argmin(values))
    assert result.steps == len(values) == best + 3 < 20
    # killed in between, and killed after its last save: the same end
    part = run(model, tmp_path / "b", every=1, patience=2, rate=2.0, steps=result.steps - 1)
    assert part.steps == result.steps - 1
    for _ in range(2):
        again = run(model, tmp_path / "b", every=1, patience=2, rate=2.0, steps=20)
        assert again.steps == result.steps
        for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(again.params)):
            np.testing.assert_array_equal(a, b)
    assert looks(tmp_path / "b") == found
