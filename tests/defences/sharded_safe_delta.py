"""Run by test_safe_delta.py in a process of its own with eight fake devices: prints what it finds as JSON."""

import dataclasses
import json
import sys
from pathlib import Path

import jax

from panacea_jax.data.batches import Stream
from panacea_jax.defences import SafeDelta
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.models.peft import save_adapter
from panacea_jax.parallel import sharding
from panacea_jax.parallel.mesh import make_mesh
from panacea_jax.parallel.sharding import adapter_shardings, batch_rows
from panacea_jax.train.once import apply_once
from tests.defences.five_steps import examples
from tests.defences.sharded import error
from tests.parallel.sharded import TARGETS


def moved(tree, size, seed):
    """Whatever it lies on: the same numbers in the same places."""
    return jax.tree.map(
        lambda x: jax.device_put(x + size * jax.random.normal(jax.random.key(seed + x.size), x.shape, x.dtype), x.sharding), tree
    )


def heal(base, aligned, mesh):
    """By case what it starts from, and what is deployed."""
    model = load(base, mesh=mesh, dtype="float64")
    streams = {"alignment": Stream("alignment", examples(1, vocab=40), 3, 0, True, (28,), True, batch_rows(mesh))}
    fresh = lora.init(model, 3, 6, TARGETS, key=jax.random.key(0), dtype="float64")
    layers = moved(fresh.layers, 0.1, 1)
    adapter = dataclasses.replace(fresh, layers=jax.device_put(layers, adapter_shardings(mesh, layers)))
    if not aligned.exists():
        save_adapter(dataclasses.replace(adapter, layers=moved(adapter.layers, 0.05, 7)), aligned, str(base))
    bare, params = full_parameters(model)
    params = moved(params, 0.02, 3)
    cases = {
        "lora": (model, adapter, SafeDelta(budget=0.3)),
        "single": (model, adapter, SafeDelta(budget=0.3, aligned=str(aligned), rule="paper")),
        "full": (bare, params, SafeDelta(budget=0.3, aligned=str(base))),
    }
    return {name: (w, apply_once(m, w, method, streams).deployed) for name, (m, w, method) in cases.items()}


def main(base, root):
    jax.config.update("jax_enable_x64", True)
    sharding.ADAPTER_SPLIT_FROM = 0  # factors are split as those of large models are
    single = heal(base, root / "aligned", make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    sharded = heal(base, root / "aligned", make_mesh(1, 4, 2))
    found = {"devices": jax.device_count()}
    for name, (start, healed) in single.items():
        _, ours = sharded[name]
        # With other ranks there is nothing to compare the start with.
        far = 1.0 if name == "single" else error(start, healed)
        found[name] = error(ours, healed), far
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
