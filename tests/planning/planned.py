"""Run by test_plan.py in a process of its own with eight fake devices: what the compiled step exchanges, as JSON."""

import json
import sys
from unittest import mock

import jax

from panacea_jax.config import get_config
from panacea_jax.defences import cross_entropy
from panacea_jax.models.families import config_from_dict
from panacea_jax.parallel import make_mesh, sharding
from panacea_jax.planning import cost_model
from panacea_jax.planning.abstract_step import abstract_step, resident
from panacea_jax.planning.hlo import operations
from panacea_jax.train.step import make_step

SHAPE = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip


LENGTH = 65  # more positions than have their logits at once
CHUNK = 32


def exchanges(text, devices):
    """Those of a program's operations in which more than one device takes part."""
    return [o for o in operations(text, devices) if o.group > 1]


@mock.patch.object(cross_entropy, "CHUNK", CHUNK)
def main(meshes, remat):
    model = config_from_dict(SHAPE)
    found = []
    for data, fsdp, tensor, batch, *how in meshes:
        sharding.ADAPTER_SPLIT_FROM = 0 if "cut" in how else 2**30
        config = get_config()
        config.lora.layers = "upper:1" if "upper" in how else ""
        config.model.dtype, config.model.remat, config.lora.rank = "float32", remat, 4
        config.train.batch_size = config.train.harmful_batch_size = batch
        config.data.max_length = LENGTH
        count = data * fsdp * tensor
        mesh = make_mesh(data, fsdp, tensor, jax.devices()[:count])
        step = abstract_step(config, model, mesh)
        program = make_step(step.model, step.defence, step.optimizer, step.shardings)
        compiled = program.lower(step.state, step.weights, step.batches, step.key).compile()
        exchanged = exchanges(compiled.as_text(), mesh.size)
        gathers = [c.result for c in exchanged if c.kind == "all-gather"]
        found.append({
            "sent": sum(c.sent for c in exchanged),
            "modelled": cost_model.sent(step),
            "largest_gather": max(gathers, default=0),
            "layer": 4 * (model.matmul_parameters() - 256 * 128) // 3,
            "flops": cost_model.flops(step),
            "counted_flops": compiled.cost_analysis()["flops"],
            "arguments": compiled.memory_analysis().argument_size_in_bytes,
            "resident": {k: n for k, n in resident(step.state, step.weights).items() if k != "start of training"},
            "kinds": {c.kind: 0 for c in exchanged} | {
                kind: sum(c.sent for c in exchanged if c.kind == kind) for kind in {c.kind for c in exchanged}
            },
        })  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
