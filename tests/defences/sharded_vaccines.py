"""Run by test_vaccines.py in a process of its own with eight fake devices: prints what it finds as JSON."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from panacea_jax.data.batches import Stream
from panacea_jax.data.encode import Example
from panacea_jax.defences import RandomVaccine, TVaccine, Vaccine
from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.models.peft import adapter_tensors
from panacea_jax.parallel.mesh import make_mesh
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer

DEFENCES = {
    "vaccine": Vaccine(rho=0.5),
    "random_vaccine": RandomVaccine(rho=0.01),
    "t_vaccine": TVaccine(rho=0.5, layers=1, interval=1, importance_interval=2),
}


def examples(seed):
    rng = np.random.default_rng(seed)
    return [Example.answering(rng.integers(0, 40, k).astype(np.int32), 2) for k in rng.integers(5, 15, 12)]


def train(folder, defence, mesh):
    """Three steps on a mesh."""
    model = load(folder, mesh=mesh, dtype="float64")
    adapter = lora.init(model, 2, 4, ("q", "o", "up"), key=jax.random.key(0), dtype="float64")
    # The rows of every run are those of the widest mesh: the noise is drawn for each of them.
    streams = {
        name: Stream(name, examples(seed), 4, 0, True, (16,), fixed_length=True, row_multiple=4)
        for seed, name in enumerate(("user", "harmful"))
    }
    assert 4 % batch_rows(mesh) == 0
    optimizer = make_optimizer(1e-2, partial=defence.partial)
    return adapter, finetune(model, adapter, defence, streams, optimizer=optimizer, steps=3)


def error(a, b):
    """Largest relative difference of a tensor."""
    return max(float(np.linalg.norm(a[n] - b[n]) / np.linalg.norm(b[n])) for n in b)


def main(folder):
    # In float32 the order of sums alone makes a difference of 1e-5 and, in EWC at its λ, of 1e-4.
    jax.config.update("jax_enable_x64", True)
    found = {"devices": len(jax.devices())}
    for name, defence in DEFENCES.items():
        _, sharded = train(folder, defence, make_mesh(1, 4, 2))
        start, single = train(folder, defence, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
        ours, other = adapter_tensors(sharded.params), adapter_tensors(single.params)
        found[name] = {
            "error": error(ours, other),
            "moved": error(adapter_tensors(start), other),
            "active": [
                np.asarray(getattr(r.state, "active", ())).tolist() for r in (sharded, single)
            ],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
