"""Booster, Booster + Vaccine, RepNoise and TAR: stopped and resumed bit for bit."""

import jax
import numpy as np
import pytest

from panacea_jax.data.batches import Stream
from panacea_jax.defences import Booster, BoosterVaccine, RepNoise, Tar
from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests.defences.five_steps import examples
from tests.tiny import write_model

METHODS = [
    Booster(lam=1.0, alpha=0.3),
    BoosterVaccine(lam=1.0, alpha=0.3, rho=0.5),
    RepNoise(alpha=0.5, beta=0.5),
    Tar(inner_steps=2, inner_every=1, inner_learning_rate=(1e-3, 1e-2)),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("tiny") / "base"), dtype="float32")


def run(model, defence, steps, checkpoints=None):
    repeats = defence.streams["harmful"].repeats if "harmful" in defence.streams else 1
    streams = {
        "user": Stream("user", examples(1, vocab=40), 3, 0, True, (28,)),
        "harmful": Stream("harmful", examples(2, vocab=40), 3, 0, True, (28,), repeats=repeats),
    }
    adapter = lora.init(model, 2, 4, ("q", "v"), key=jax.random.key(0))
    return finetune(
        model, adapter, defence, streams,
        optimizer=make_optimizer(1e-2), steps=steps, checkpoints=checkpoints,
    )  # fmt: skip


@pytest.mark.parametrize("defence", METHODS, ids=lambda d: type(d).__name__)
def test_three_steps_and_three_are_six(model, tmp_path, defence):
    whole = run(model, defence, 6)
    part = run(model, defence, 3, Checkpoints(tmp_path / "c"))
    resumed = run(model, defence, 6, Checkpoints(tmp_path / "c"))
    assert (part.steps, resumed.steps) == (3, 6)
    pairs = list(
        zip(
            jax.tree.leaves((whole.params, whole.state)),
            jax.tree.leaves((resumed.params, resumed.state)),
            strict=True,
        )
    )
    assert len(pairs) == (8 if isinstance(defence, Tar) else 4)  # TAR's start is state too
    for a, b in pairs:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    moved = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(jax.tree.leaves(part.params), jax.tree.leaves(resumed.params))
    ]
    assert min(moved) > 0
