"""Run by test_sharded_alignment.py in a process of its own with eight fake devices: prints errors by method as JSON."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from panacea_jax.data.batches import Stream
from panacea_jax.defences import Booster, BoosterVaccine, RepNoise, Tar
from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.models.peft import adapter_tensors
from panacea_jax.parallel.mesh import make_mesh
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests.defences.five_steps import examples

METHODS = {
    "booster": Booster(lam=1.0, alpha=0.3),
    "booster_vaccine": BoosterVaccine(lam=1.0, alpha=0.3, rho=0.5),
    "repnoise": RepNoise(alpha=0.5, beta=0.5),
    "tar": Tar(inner_steps=2, inner_every=1, inner_learning_rate=1e-3),
}
DROPOUT = {"booster": 0.3}


def train(folder, mesh, defence, dropout):
    """Two steps on three rows, which four parts fill up with a row of padding."""
    model = load(folder, mesh=mesh, dtype="float32")
    targets = ("q", "o", "up", "down")
    start = lora.init(model, 2, 4, targets, key=jax.random.key(0), dropout=dropout)
    repeats = defence.streams["harmful"].repeats if "harmful" in defence.streams else 1
    rows = batch_rows(mesh)
    streams = {
        "user": Stream("user", examples(1, vocab=40), 3, 0, True, (28,), False, rows),
        "harmful": Stream(
            "harmful", examples(2, vocab=40), 3, 0, True, (28,), False, rows, repeats=repeats
        ),
    }
    result = finetune(model, start, defence, streams, optimizer=make_optimizer(1e-2), steps=2)
    return adapter_tensors(start), adapter_tensors(result.params)


def error(a, b):
    """Largest relative difference of a tensor."""
    return max(float(np.linalg.norm(a[n] - b[n]) / np.linalg.norm(b[n])) for n in b)


def main(folder, names):
    devices = jax.devices()
    found = {"devices": len(devices)}
    for name in names:
        what = METHODS[name], DROPOUT.get(name, 0.0)
        _, sharded = train(folder, make_mesh(1, 4, 2), *what)
        start, single = train(folder, make_mesh(1, 1, 1, devices=devices[:1]), *what)
        found[name] = {"error": error(sharded, single), "moved": error(start, single)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(METHODS))
