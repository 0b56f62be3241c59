"""Run by test_checkpoints.py in a process of its own with eight fake devices: the checksum of one array, however it lies."""

import json

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from panacea_jax.train.checksums import checksums

if __name__ == "__main__":
    array = np.arange(16 * 24, dtype=np.float32).reshape(16, 24)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    specs = ((), ("x",), (None, "y"), ("y", "x"), (("x", "y"),))
    placed = {str(spec): jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec))) for spec in specs}
    print(json.dumps(checksums({"host": array} | placed)))
