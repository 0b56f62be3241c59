"""Run by test_cross_entropy.py in a process with eight fake devices: the loss on meshes against one device, as JSON."""

import json
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from panacea_jax.data.batches import Batch
from panacea_jax.defences import Loss, cross_entropy
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.parallel import batch_sharding, make_mesh
from tests.train.test_packing import difference


def gradient(folder, mesh, full):
    model = load(folder, mesh=mesh, dtype="float32")
    params = lora.init(model, 2, 4, ("q", "down"), key=jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.02, params)
    if full:
        model, params = full_parameters(model)
    rng = np.random.default_rng(0)
    tokens, starts = rng.integers(0, 40, (8, 50)).astype(np.int32), rng.integers(20, 49, (8, 1))
    mask = np.arange(50) >= starts
    batch = jax.device_put(Batch(tokens, mask, np.ones_like(mask)), batch_sharding(mesh))
    found = jax.jit(lambda loss, p, b: (*jax.value_and_grad(loss)(p, b), of_tokens(loss, p, b)))(Loss.of(model), params, batch)
    shares = jax.device_put(rng.uniform(0.5, 2, tokens.shape).astype(np.float32), batch_sharding(mesh))
    return jax.device_get((*found, _by_shares(Loss.of(model), params, batch, shares)))


@jax.jit
def _by_shares(loss, params, batch, shares):
    def weighted(params, shares):
        return loss.weighted(params, loss.forward(params, batch).hidden, batch, shares)

    return jax.grad(weighted, (0, 1))(params, shares)


def of_tokens(loss, params, batch):
    """Each token's loss by itself."""
    return loss.of_tokens(params, loss.forward(params, batch).hidden, batch)


@mock.patch.object(cross_entropy, "CHUNK", 16)
def main(folder):
    found = {}
    for sizes in ((2, 2, 2),):
        errors = {}
        for full in (False, True):
            one = gradient(folder, make_mesh(1, 1, 1, devices=jax.devices()[:1]), full)
            many = gradient(folder, make_mesh(*sizes), full)
            errors[f"loss {full}"] = abs(float(many[0] / one[0]) - 1)
            errors[f"gradient {full}"] = difference(many[1], one[1])
            errors[f"tokens {full}"] = difference(many[2], one[2])
            errors[f"weighted {full}"] = max(map(difference, many[3], one[3]))
        found[str(sizes)] = errors
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
