"""Run by test_fused.py in a process of its own with eight fake devices: splash on a mesh against the plain way on one device."""

import json
import sys
from pathlib import Path

import jax

from panacea_jax.models import fused
from panacea_jax.models.model import load
from panacea_jax.parallel import make_mesh
from tests.models.test_fused import assert_same, logits_and_gradients, with_attention


def main(folder):
    fused.INTERPRET = True
    done = [jax.device_count()]
    for family in ("gemma", "gemma2"):
        single = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        want = load(folder / family, mesh=single, dtype="float32", attention="xla")
        got = load(folder / family, mesh=make_mesh(1, 3, 2, jax.devices()[:6]), dtype="float32")
        assert_same(logits_and_gradients(with_attention(got, "splash")), logits_and_gradients(want))
        done.append(family)
    print(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
