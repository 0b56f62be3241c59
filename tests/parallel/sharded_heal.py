"""Run by test_sharding.py in a process of its own with eight fake devices: the healing methods, sharded and on one device, as JSON."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from panacea_jax.data.batches import Stream
from panacea_jax.defences import (
    Antidote,
    MagnitudePrune,
    RandomPerturbation,
    RandomPrune,
    Realign,
    SafeLora,
)
from panacea_jax.export import epsilon_tensors, save_model
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.parallel.mesh import make_mesh
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.train.loop import finetune
from panacea_jax.train.once import apply_once
from panacea_jax.train.optimizer import make_optimizer
from tests.parallel.sharded import TARGETS, error, examples


def random_adapter(model, seed):
    fresh = lora.init(model, 3, 6, TARGETS, key=jax.random.key(seed))
    layers = jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(seed + x.size), x.shape), fresh.layers
    )
    return lora.Adapter(jax.device_put(layers, jax.tree.leaves(fresh)[0].sharding), 3, 6.0)


def heal(base, aligned, mesh):
    """By method what it deploys, before and after, under exported names."""
    model = load(aligned, mesh=mesh, dtype="float32")
    adapter = random_adapter(model, 5)
    streams = {
        name: Stream(name, examples(i), 5, 0, True, (16,), row_multiple=batch_rows(mesh))
        for i, name in enumerate(("user", "harmful"))
    }
    found = {"start": adapter}
    for name, method in {
        "antidote": Antidote(0.3), "random_prune": RandomPrune(0.3), "magnitude_prune": MagnitudePrune(0.3),
        "safelora": SafeLora(str(base), num_layers=3), "random_perturbation": RandomPerturbation(0.5),
    }.items():  # fmt: skip
        found[name] = apply_once(model, adapter, method, streams).deployed
    tail = {"optimizer": make_optimizer(1e-2), "steps": 3}
    found["realign"] = finetune(model, adapter, Realign(), streams, **tail).deployed
    bare, params = full_parameters(model)
    found["full_start"] = params
    noise = RandomPerturbation(0.5)
    found["full_random_perturbation"] = apply_once(bare, params, noise, streams).deployed
    found["full_antidote"] = apply_once(bare, params, Antidote(0.3), streams).deployed
    return {name: epsilon_tensors(tree) for name, tree in found.items()}


def main(root):
    base = root / "base"
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = load(base, mesh=mesh, dtype="float32")
    save_model(model, random_adapter(model, 1), root / "aligned")
    sharded, single = (heal(base, root / "aligned", m) for m in (make_mesh(1, 4, 2), mesh))
    result = {}
    for name, tensors in single.items():
        if "start" not in name:
            start = single["full_start" if name.startswith("full") else "start"]
            changed = sum(not np.array_equal(tensors[n], start[n]) for n in tensors)
            result[name] = (error(sharded[name], tensors), changed)
    print(json.dumps({"devices": jax.device_count(), "methods": result}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
