"""Run by test_decode.py in a process of its own with eight fake devices: prints the ids of each mesh as JSON."""

import json
import sys

import jax
import numpy as np

from panacea_jax.generate import decode
from panacea_jax.models.model import load
from panacea_jax.parallel import make_mesh
from tests.families import VOCAB

MESHES = {"1x1x1": (1, 1, 1), "1x1x2": (1, 1, 2), "2x2x2": (2, 2, 2), "8x1x1": (8, 1, 1)}


def main(folder):
    decode.GROWS = 0  # the cache grows as on a CPU with a large one
    rng = np.random.default_rng(4)
    begin = rng.integers(1, VOCAB, 20).tolist()
    prompts = [
        begin + rng.integers(1, VOCAB, n).tolist() for n in (3, 130, 50, 9, 80, 25, 5, 1, 7, 14, 33)
    ]
    found = {"prompts": prompts, "devices": jax.device_count()}
    for name, sizes in MESHES.items():
        devices = jax.devices()[: int(np.prod(sizes))]
        model = load(folder, mesh=make_mesh(*sizes, devices=devices), dtype="float32")
        rows = decode.generate(
            model, model.weights, None, prompts, batch_size=3, max_new_tokens=32, eos_ids=[], pad_id=0,
            shared=decode.common_prefix(prompts),
        )  # fmt: skip
        found[name] = [ids for _, ids, _ in sorted(rows)]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
