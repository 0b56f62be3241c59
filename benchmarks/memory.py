"""Peak temporary memory of the compiled step of several defences, without weights: everything is compiled from shapes alone.

    python benchmarks/memory.py                                   # Llama-2-7B's shape, this machine's CPU backend
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/memory.py --tpu v5e:2x2       # needs libtpu, and no TPU

Prints for each defence and each rematerialisation GiB of temporaries (activations, gradients; not weights, optimizer moments or batches,
which are arguments), and the ratio to the first row. LoRA r 8 on all seven projections, bfloat16 base, harmful batch of one record for
T-Vaccine.
"""

import argparse
import dataclasses
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.experimental import topologies
from jax.sharding import Mesh

from panacea_jax.data.batches import Batch
from panacea_jax.defences import DEFENCES, Defence
from panacea_jax.models import lora
from panacea_jax.models.adapter import BLOCK_OF
from panacea_jax.models.config import ModelConfig
from panacea_jax.models.model import Model, abstract
from panacea_jax.parallel import batch_sharding, make_mesh, replicated, weight_sharding
from panacea_jax.train.optimizer import make_optimizer
from panacea_jax.train.step import TrainState, make_step, state_shardings

LLAMA_2_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def placed(tree: Any, sharding: Any) -> Any:
    """Shapes with a place."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def temporary_bytes(
    config: ModelConfig, defence: Defence, remat: str, mesh: Mesh, *,
    rows: int, length: int, harmful_rows: int = 1, dtype: str = "bfloat16", rank: int = 8,
) -> int:  # fmt: skip
    """Peak of the temporaries of a compiled train step, by the compiler's own account, of one device."""
    graphdef, shapes = abstract(config, dtype, remat)
    weights = unflatten_dict({
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=weight_sharding(mesh, path, shape))
        for path, shape in shapes.items()
    }, sep="/")  # fmt: skip
    model = Model(config, graphdef, None, jnp.dtype(dtype), mesh)
    everywhere = replicated(mesh)
    adapter = jax.eval_shape(
        lambda key: lora.init(model, rank, 4, tuple(BLOCK_OF), key=key), jax.random.key(0)
    )
    params = placed(adapter, everywhere)
    optimizer = make_optimizer(1e-3, partial=hasattr(defence, "trained"))

    def begin(params: Any) -> TrainState:
        step = jnp.zeros((), jnp.int32)
        return TrainState(params, optimizer.init(params), defence.init(params), step)

    made = jax.eval_shape(begin, params)
    shardings = state_shardings(made, params)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), made, shardings
    )

    def batch(rows: int) -> Batch:
        shape, dtypes = (rows, length), (jnp.int32, bool, bool)
        return Batch(
            *(jax.ShapeDtypeStruct(shape, d, sharding=batch_sharding(mesh)) for d in dtypes)
        )

    batches = {"user": batch(rows)} | {name: batch(harmful_rows) for name in defence.streams}
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
    step: Any = make_step(model, defence, optimizer, shardings)
    return int(
        step.lower(state, weights, batches, key).compile().memory_analysis().temp_size_in_bytes
    )


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--defences", nargs="+", default=["vaccine", "t_vaccine", "sft"])
    parser.add_argument("--remat", nargs="+", default=["none", "dots", "full"])
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16", help="of the base and of the computation")
    parser.add_argument("--harmful-rows", type=int, default=1)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--active", type=int, default=8, help="T-Vaccine's S")
    parser.add_argument(
        "--tpu", default="", help="topology to compile for, e.g. v5e:2x2; its first device is used"
    )
    args = parser.parse_args()

    config = ModelConfig.from_dict(LLAMA_2_7B | {"num_hidden_layers": args.layers})
    devices = jax.devices()[:1]
    if args.tpu:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=args.tpu).devices[:1]
    mesh = make_mesh(1, 1, 1, devices=devices)
    print(
        f"jax {jax.__version__}, {devices[0].device_kind}, B {args.rows}, T {args.length}, {args.layers} layers, {args.dtype}"
    )
    first = None
    for name in args.defences:
        defence: Any = DEFENCES[name]()
        if name == "t_vaccine":
            defence = dataclasses.replace(defence, layers=args.active)
        for remat in args.remat:
            size = temporary_bytes(
                config, defence, remat, mesh,
                rows=args.rows, length=args.length, harmful_rows=args.harmful_rows,
                dtype=args.dtype,
            )  # fmt: skip
            first = first or size
            print(
                f"{name:12s} remat {remat:5s} {size / 2**30:7.2f} GiB  x{size / first:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
