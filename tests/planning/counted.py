"""What compiled steps compute, move, send and hold, as JSON; run by test_counts.py.

On eight fake devices of the CPU, and for the accelerators whose compilers are installed. A change that was meant: ``make counts``.
"""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import jax

from panacea_jax.config import get_config
from panacea_jax.models.families import config_from_dict
from panacea_jax.parallel import make_mesh
from panacea_jax.planning.abstract_step import abstract_step
from panacea_jax.planning.gpu_target import COMPILER_OPTIONS
from panacea_jax.planning.hlo import custom_calls, operations
from panacea_jax.planning.topology import topology
from panacea_jax.train.step import make_step

GOLDEN = Path(__file__).with_name("counts.json")
SHAPE = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
# Method, devices of fsdp, whether all parameters are trained.
STEPS = (("sft", 1, False), ("panacea", 1, False), ("panacea", 8, False), ("panacea", 8, True))
# Package of the compiler, topology.
ELSEWHERE = (("libtpu", "v5e:2x2"), ("jax_cuda13_plugin", "gpu:h100x2"))


def counts(method, devices, full, chip=None):
    """Of one compiled step; tensors are small, so what the figures are worth is that they stay."""
    config = get_config()
    config.defence.name, config.lora.rank, config.train.full_parameters = method, 4, full
    config.model.dtype, config.model.remat, config.data.max_length = "float32" if chip is None else "bfloat16", "full", 128
    config.train.batch_size = config.train.harmful_batch_size = 8
    mesh = make_mesh(1, len(devices), 1, devices)
    gpu = chip is not None and chip.platform == "gpu"
    step = abstract_step(config, config_from_dict(SHAPE), mesh, chip if gpu else None)
    program = make_step(step.model, step.defence, step.optimizer, step.shardings)
    lowered = program.lower(step.state, step.weights, step.batches, step.key)
    compiled = lowered.compile(COMPILER_OPTIONS if gpu else {})
    text = compiled.as_text()
    found = operations(text, len(devices))
    exchanged = Counter()
    for o in found:
        if o.sent:
            exchanged[o.kind] += o.times
    return {
        "GFLOP": sum(o.flops * o.times for o in found) / 1e9,
        "MB moved": sum(o.moved * o.times for o in found) / 1e6,
        "MB sent": sum(o.sent for o in found) / 1e6,
        "MB held": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "exchanges": dict(exchanged),
        "kernels": custom_calls(text) if chip is not None else {},
    }


def main():
    found = {"jax": jax.__version__}
    for method, count, full in STEPS:
        found[f"{method}{', all parameters' * full}, {count} of the CPU"] = counts(method, jax.devices()[:count], full)
    for package, name in ELSEWHERE:
        if importlib.util.find_spec(package):
            place = topology(name)
            found[f"panacea, {name}"] = counts("panacea", place.devices, False, place.chip)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
