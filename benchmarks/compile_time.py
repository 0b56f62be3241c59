"""Compile time of the Panacea step at several depths: it must not grow with the number of layers.

    python benchmarks/compile_time.py --layers 4 16 32 --repeats 3

Prints seconds to trace, lower and compile (median), relative to the first depth.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from panacea_jax.data.batches import Batch
from panacea_jax.defences import Panacea
from panacea_jax.models import lora
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import random_model
from panacea_jax.train.optimizer import make_optimizer
from panacea_jax.train.step import init_state, make_step
from panacea_jax.worlds.base import LLAMA


def seconds(layers: int) -> float:
    """Seconds from nothing to a compiled step, the persistent cache unused."""
    config = config_from_dict(LLAMA | {"vocab_size": 256, "num_hidden_layers": layers})
    model = random_model(config, jax.random.key(0))
    params = lora.init(model, 8, 4, key=jax.random.key(1))
    defence, optimizer = Panacea(rho=1.0, lam=1e-3), make_optimizer(1e-4)
    state = init_state(params, defence, optimizer)
    step = make_step(model, defence, optimizer, jax.tree.map(lambda x: x.sharding, state))
    ones = jnp.ones((4, 32), bool)
    batch = Batch(jnp.ones((4, 32), jnp.int32), ones, ones)
    jax.clear_caches()
    start = time.perf_counter()
    step.lower(state, model.weights, {"user": batch, "harmful": batch}, jax.random.key(0)).compile()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    times: dict[int, list[float]] = {layers: [] for layers in args.layers}
    for _ in range(
        args.repeats
    ):  # interleaved, so that a busy spell of the machine hits every depth
        for layers in args.layers:
            times[layers].append(seconds(layers))
    first = statistics.median(times[args.layers[0]])
    for layers in args.layers:
        median = statistics.median(times[layers])
        print(
            f"{layers:3d} layers: {median:6.2f} s  x{median / first:.2f}   {[f'{t:.2f}' for t in times[layers]]}"
        )


if __name__ == "__main__":
    main()
