"""Run by test_sharding.py in a process of its own with eight fake devices: prints what it finds as JSON."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

from panacea_jax.data.batches import Stream
from panacea_jax.data.encode import Example
from panacea_jax.defences import Panacea
from panacea_jax.generate import decode
from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.models.peft import adapter_tensors
from panacea_jax.parallel import sharding
from panacea_jax.parallel.mesh import make_mesh
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer

STEPS = 10
# By name: data, fsdp, tensor, replica, and whether the adapter is cut like its matrices.
MESHES = {
    "1×8×1×1": (8, 1, 1, 1, False),
    "1×1×8×1": (1, 8, 1, 1, False),
    "1×1×4×2": (1, 4, 2, 1, False),
    "2×1×2×2, adapter cut": (1, 2, 2, 2, True),
    "1×1×4×2, adapter cut": (1, 4, 2, 1, True),
    "1×2×2×2": (2, 2, 2, 1, False),
}
TARGETS = ("q", "o", "up", "down")
B_OF = (("self_attn", "q_proj"), ("mlp", "down_proj"))


def examples(seed):
    rng = np.random.default_rng(seed)
    return [Example.answering(rng.integers(0, 40, k).astype(np.int32), 2) for k in rng.integers(5, 15, 12)]


def train(folder, mesh, ascent_steps=1):
    """A few Panacea steps on a mesh: the model, w + ε and ε by PEFT name."""
    model = load(folder, mesh=mesh, dtype="float32")
    adapter = lora.init(model, 2, 4, TARGETS, key=jax.random.key(0))
    streams = {
        name: Stream(
            name,
            examples(seed),
            3,
            0,
            True,
            (16,),
            fixed_length=True,
            row_multiple=batch_rows(mesh),
        )
        for seed, name in enumerate(("user", "harmful"))
    }
    defence = Panacea(rho=0.5, lam=0.3, ascent_steps=ascent_steps)
    result = finetune(model, adapter, defence, streams, optimizer=make_optimizer(1e-2), steps=STEPS)
    return model, result


def error(a, b):
    """Largest relative difference of a tensor."""
    return max(float(np.linalg.norm(a[n] - b[n]) / np.linalg.norm(b[n])) for n in b)


def main(folder):
    devices = jax.devices()
    single_model, single = train(folder, make_mesh(1, 1, 1, devices=devices[:1]))
    found = {}
    for name, (data, fsdp, tensor, replica, cut) in MESHES.items():
        sharding.ADAPTER_SPLIT_FROM = 0 if cut else 2**30
        model, sharded = train(folder, make_mesh(data, fsdp, tensor, replica=replica))
        factors = [t.layers[b][p]["b"] for t in (sharded.params, sharded.epsilon) for b, p in B_OF]
        found[name] = {
            "error": error(adapter_tensors(sharded.params), adapter_tensors(single.params)),
            "error_epsilon": error(adapter_tensors(sharded.epsilon), adapter_tensors(single.epsilon)),
            "compilations": sharded.compilations,
            "parts": [x.size // x.addressable_shards[0].data.size for x in factors],
        }  # fmt: skip
    sharding.ADAPTER_SPLIT_FROM = 2**30
    (_, eight), (_, one) = (train(folder, m, 3) for m in (make_mesh(1, 4, 2), make_mesh(1, 1, 1, devices=devices[:1])))  # fmt: skip
    ascent = [error(adapter_tensors(a), adapter_tensors(b)) for a, b in ((eight.params, one.params), (eight.epsilon, one.epsilon))]
    start = lora.init(single_model, 2, 4, TARGETS, key=jax.random.key(0))
    q = model.weights["layers"]["self_attn"]["q_proj"]["kernel"]
    prompts = [[3 + (7 * i + j) % 35 for j in range(1 + 3 * i)] for i in range(9)]
    cache = decode._programs(dataclasses.replace(model, weights=None, folder=None), decode.GREEDY, 0).empty(8, 64, model.dtype, ())
    keys = cache.cache.layers[0][0].x
    answers = [
        sorted(
            (i, ids)
            for i, ids, _ in decode.generate(
                m,
                m.weights,
                r.deployed,
                prompts,
                batch_size=4,
                max_new_tokens=20,
                eos_ids=[1],
                pad_id=0,
            )
        )
        for m, r in ((model, sharded), (single_model, single))
    ]
    print(json.dumps({
        "devices": len(devices),
        "ascent": ascent,
        "meshes": found,
        "moved": error(adapter_tensors(single.deployed), adapter_tensors(single.params)),
        "trained": float(np.linalg.norm(np.asarray(single.params.layers["mlp"]["up_proj"]["b"] - start.layers["mlp"]["up_proj"]["b"]))),
        "shard": q.addressable_shards[0].data.shape,
        "whole": q.shape,
        "cache": (keys.shape, keys.addressable_shards[0].data.shape),
        "answers": answers,
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
