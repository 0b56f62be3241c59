"""Peak temporary memory of the compiled step of several defences, without weights: everything is compiled from shapes alone.

    python benchmarks/memory.py                                   # Llama-2-7B's shape, this machine's CPU backend
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/memory.py --tpu v5p:2x2x1     # needs libtpu, and no TPU

Prints for each defence and each rematerialisation GiB of temporaries (activations, gradients; not weights, optimizer moments or batches,
which are arguments), and the ratio to the first row. LoRA r 8 on all seven projections, bfloat16 base, harmful batch of one record for
T-Vaccine.
"""

import argparse
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jax.sharding import Mesh

from panacea_jax.config import get_config
from panacea_jax.models.adapter import BLOCK_OF
from panacea_jax.models.config import ModelConfig
from panacea_jax.models.families import config_from_dict
from panacea_jax.parallel import make_mesh
from panacea_jax.planning.abstract_step import abstract_step
from panacea_jax.planning.topology import topology
from panacea_jax.train.step import make_step

LLAMA_2_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def temporary_bytes(
    config: ModelConfig, defence: str, remat: str, mesh: Mesh, *,
    rows: int, length: int, harmful_rows: int = 1, dtype: str = "bfloat16", rank: int = 8, **hyper_parameters: int,
) -> int:  # fmt: skip
    """Peak of the temporaries of a compiled train step, by the compiler's own account, of one device."""
    settings = get_config()
    settings.model.dtype, settings.model.remat, settings.data.max_length = dtype, remat, length
    settings.lora.rank, settings.lora.targets = rank, tuple(BLOCK_OF)
    settings.train.batch_size, settings.train.harmful_batch_size = rows, harmful_rows
    settings.defence.name = defence
    for key, value in hyper_parameters.items():
        settings.defence[key] = value
    step = abstract_step(settings, config, mesh)
    program: Any = make_step(step.model, step.defence, step.optimizer, step.shardings)
    compiled = program.lower(step.state, step.weights, step.batches, step.key).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


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
        "--tpu",
        default="",
        help="topology to compile for, e.g. v5p:2x2x1; its first device is used, which has to hold it all",
    )
    args = parser.parse_args()

    config = config_from_dict(LLAMA_2_7B | {"num_hidden_layers": args.layers})
    devices = jax.devices()[:1]
    if args.tpu:
        devices = list(topology(args.tpu).devices or ())[:1]
    mesh = make_mesh(1, 1, 1, devices=devices)
    print(
        f"jax {jax.__version__}, {devices[0].device_kind}, B {args.rows}, T {args.length}, {args.layers} layers, {args.dtype}"
    )
    first = None
    for name in args.defences:
        active = {"layers": args.active} if name == "t_vaccine" else {}
        for remat in args.remat:
            size = temporary_bytes(
                config, name, remat, mesh,
                rows=args.rows, length=args.length, harmful_rows=args.harmful_rows,
                dtype=args.dtype, **active,
            )  # fmt: skip
            first = first or size
            print(
                f"{name:12s} remat {remat:5s} {size / 2**30:7.3f} GiB  x{size / first:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
