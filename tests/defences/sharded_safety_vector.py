"""Run by test_safety_vector.py in a process of its own with eight fake devices: what compares with an unaligned base, sharded and on one
device, as JSON."""

import json
import sys
from pathlib import Path

import jax

from panacea_jax.data.batches import Stream
from panacea_jax.defences import Asft, Lox, Resta, SafeMerge
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.parallel.mesh import make_mesh
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.train.loop import finetune
from panacea_jax.train.once import apply_once
from panacea_jax.train.optimizer import make_optimizer
from tests.defences.sharded import error
from tests.parallel.sharded import examples


def outcomes(root, mesh):
    """By name what each method makes, the start, and of AsFT the parts that its largest direction is cut into."""
    base, before, safe = root / "base", str(root / "before"), str(root / "safe")
    model = load(base, mesh=mesh, dtype="float64")
    streams = {"user": Stream("user", examples(0), 3, 0, True, (16,), row_multiple=batch_rows(mesh))}
    found, parts = {}, 0
    for full in (False, True):
        if full:
            bare, params = full_parameters(model)
        else:
            bare, params = model, jax.tree.map(lambda x: x.astype("float64"), lora.load(root / "tuned", model))
        kind = "full" if full else "lora"
        found[f"start/{kind}"] = params
        tail = {"optimizer": make_optimizer(1e-3 if full else 1e-2), "steps": 3}
        for name, defence in {"asft": Asft(lam=0.5, base=before), "lox": Lox(k=2)}.items():
            result = finetune(bare, params, defence, streams, **tail)
            assert result.compilations == 1
            found[f"{name}/{kind}"] = (result.params, result.deployed, result.state)
            if name == "asft":
                v = result.state.direction.tree["mlp"]["up_proj"]["kernel"]
                parts = v.size // v.addressable_shards[0].data.size
    found["lox/given"] = apply_once(bare, params, Lox(k=2, base=before), {}).deployed
    found["resta/full"] = apply_once(bare, params, Resta(base=before, aligned=str(base)), {}).deployed
    adapter = found["start/lora"]
    found["resta/lora"] = apply_once(model, adapter, Resta(base=str(base), aligned=safe), {}).deployed
    found["safemerge/lora"] = apply_once(model, adapter, SafeMerge(base=before, safe=safe, threshold=0.9), {}).deployed
    return found, parts


def main(root):
    jax.config.update("jax_enable_x64", True)
    single, _ = outcomes(root, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    sharded, parts = outcomes(root, make_mesh(1, 4, 2))
    print(json.dumps({"parts": parts, "errors": {name: error(sharded[name], single[name]) for name in single}}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
