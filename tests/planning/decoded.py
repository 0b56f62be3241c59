"""Run by test_recipe.py in a process of its own with eight fake devices: what decoding a chunk of tokens sends, as JSON."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from panacea_jax.config import get_config
from panacea_jax.generate import decode
from panacea_jax.models.families import config_from_dict
from panacea_jax.parallel import make_mesh
from panacea_jax.planning import cost_model
from panacea_jax.planning.abstract_step import abstract_step
from tests.planning.planned import SHAPE, exchanges


def made_by(lowered):
    """What a program returns: shapes with the places that the compiler gives them."""
    places = lowered.compile().output_shardings
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), lowered.out_info, places)


def main(fsdp):
    config = get_config()
    config.model.dtype, config.lora.rank, config.data.max_length = "float32", 4, 32
    config.train.batch_size = config.train.harmful_batch_size = fsdp
    step = abstract_step(config, config_from_dict(SHAPE), make_mesh(1, fsdp, 1, jax.devices()[:fsdp]))
    static = dataclasses.replace(step.model, weights=None, folder=None)
    program = decode._programs(static, decode.GREEDY, 0)
    params = step.state.params
    unstacked = made_by(program.unstack.lower(step.weights, params))
    rows = made_by(program.empty.lower(8, 64, jnp.dtype("float32"), ()))
    compiled = program.extend.lower(step.weights, params, unstacked, rows, np.asarray([1], np.int32)).compile()
    text = compiled.as_text()
    entry = text[text.index("\nENTRY") :]  # outside the loop over tokens
    found = exchanges(entry, fsdp)
    print(json.dumps([sum(c.sent for c in found if c.kind == "all-gather"), cost_model.sent_to_gather(step)]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
