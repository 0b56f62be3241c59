"""Run by test_triplet.py in a process of its own with eight fake devices: prints what it finds as JSON."""

import json
import sys
from pathlib import Path

import jax

from panacea_jax.data.batches import Stream
from panacea_jax.defences import Triplet
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.parallel.mesh import make_mesh
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests.defences.five_steps import examples
from tests.defences.sharded import error
from tests.parallel.sharded import TARGETS


def train(folder, mesh, full):
    """Two steps on three rows, which four parts fill up with a row of padding: the start, and what came of it."""
    model = load(folder, mesh=mesh, dtype="float64")
    if full:
        model, start = full_parameters(model)
    else:
        start = lora.init(model, 2, 4, TARGETS, key=jax.random.key(0), dtype="float64")
    streams = {
        name: Stream(name, examples(seed, vocab=40), 3, 0, True, (28,), False, batch_rows(mesh))
        for seed, name in enumerate(("user", "harmful", "benign"))
    }
    defence = Triplet(refusal=0.5)
    return start, finetune(model, start, defence, streams, optimizer=make_optimizer(1e-3), steps=2).params


def main(folder):
    jax.config.update("jax_enable_x64", True)
    found = {"devices": jax.device_count()}
    for name, full in {"lora": False, "full": True}.items():
        _, sharded = train(folder, make_mesh(1, 4, 2), full)
        start, single = train(folder, make_mesh(1, 1, 1, devices=jax.devices()[:1]), full)
        found[name] = error(sharded, single), error(start, single)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
