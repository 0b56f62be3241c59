"""Run by test_finetuning_runs.py in a process of its own with eight fake devices: prints what it finds as JSON."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from panacea_jax.data.batches import Stream
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.parallel.mesh import make_mesh
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests.defences.test_finetuning_runs import FULL, METHODS
from tests.parallel.sharded import TARGETS, examples


def train(folder, mesh, defence, full):
    """Four steps on a mesh: the parameters at the start, and the result."""
    model = load(folder, mesh=mesh, dtype="float64")
    if full:
        model, params = full_parameters(model)
    else:
        params = lora.init(model, 2, 4, TARGETS, key=jax.random.key(0), dtype="float64")
    rows = batch_rows(mesh)
    streams = {
        name: Stream(name, examples(seed), 3, 0, True, (16,), row_multiple=rows)
        for seed, name in enumerate(("user", "alignment", "harmful"))
    }
    optimizer = make_optimizer(1e-3 if full else 1e-2)
    return params, finetune(model, params, defence, streams, optimizer=optimizer, steps=4)


def error(a, b):
    """Largest relative difference of a tensor; nothing is compared with zero."""
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(*map(jax.tree.leaves, (a, b)))]
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs if y.any())


def main(folder):
    # In float32 the order of sums alone makes a difference of 1e-5 and, in EWC at its λ, of 1e-4.
    jax.config.update("jax_enable_x64", True)
    sharded, single = make_mesh(1, 4, 2), make_mesh(1, 1, 1, devices=jax.devices()[:1])
    found = {}
    for name, defence in [*METHODS.items(), *((f"{name}_full", METHODS[name]) for name in FULL)]:
        full = name.endswith("_full")
        _, ours = train(folder, sharded, defence, full)
        start, alone = train(folder, single, defence, full)
        differ = max(
            error((ours.params, ours.state), (alone.params, alone.state)),
            error(ours.deployed, alone.deployed),
        )
        found[name] = (differ, error(start, alone.params), ours.compilations)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
