"""FLOPs of one compiled step of every defence, as a multiple of SFT's, beside what its ``facts`` say.

    python benchmarks/passes.py            # or some: python benchmarks/passes.py panacea vaccine

XLA's cost analysis counts the body of a loop once, however often it runs, and the decoder is a loop over its layers; so the steps
counted here are traced with every ``lax.scan`` unrolled. The compiled program is counted, after XLA has dropped what no output needs:
that is why Vaccine's first pass, which has no adapter gradient to make and stops at the first layer's attention, costs a little less
than a pass. A ``lax.cond`` counts as its dearer branch. The shape is one where matrix products dominate; all streams have the same.
"""

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from panacea_jax.data.batches import Batch
from panacea_jax.defences import DEFENCES
from panacea_jax.models import lora
from panacea_jax.models.config import ModelConfig
from panacea_jax.models.model import Model, init
from panacea_jax.parallel import make_mesh
from panacea_jax.train.optimizer import make_optimizer
from panacea_jax.train.step import init_state, make_step

SHAPE = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
ROWS, LENGTH, RANK = 8, 64, 8


@contextlib.contextmanager
def unrolled() -> Iterator[None]:
    """Trace every ``lax.scan`` as so many copies of its body."""
    scan = jax.lax.scan

    def copies(*args: Any, **settings: Any) -> Any:
        return scan(*args, **(settings | {"unroll": True}))

    with mock.patch.object(jax.lax, "scan", copies):
        yield


def make_model() -> Model:
    """A random model of the shape."""
    return init(ModelConfig.from_dict(SHAPE), jax.random.key(0), mesh=make_mesh(devices=jax.devices()[:1]))  # fmt: skip


def _batch(seed: int) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, SHAPE["vocab_size"], (ROWS, LENGTH))
    response = np.broadcast_to(np.arange(LENGTH) >= LENGTH // 2, tokens.shape)
    return Batch(jnp.asarray(tokens, jnp.int32), jnp.asarray(response), jnp.ones(tokens.shape, bool))  # fmt: skip


def step_flops(model: Model, defence: Any) -> float:
    """FLOPs of the compiled step."""
    params = lora.init(model, RANK, 4, ("q", "k", "v"), key=jax.random.key(1))
    optimizer = make_optimizer(1e-3)
    state = init_state(params, defence, optimizer)
    batches = {name: _batch(i) for i, name in enumerate(("user", *defence.streams))}
    with unrolled():
        step: Any = make_step(model, defence, optimizer, jax.tree.map(lambda x: x.sharding, state))
        compiled = step.lower(state, model.weights, batches, jax.random.key(0)).compile()
    return float(compiled.cost_analysis()["flops"])


def stated(kind: type[Any]) -> float:
    """The sum of ``facts.passes``."""
    return float(sum(kind.facts.passes.values()))


def ratios(names: list[str]) -> dict[str, float]:
    """Measured ratio to SFT by name."""
    model = make_model()
    sft = step_flops(model, DEFENCES["sft"]())
    return {name: step_flops(model, DEFENCES[name]()) / sft for name in names}


def main() -> None:
    """Measure and print as a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stepping = [name for name, kind in DEFENCES.items() if stated(kind)]
    parser.add_argument(
        "names", nargs="*", default=stepping, help="defences; by default all with steps"
    )
    names = parser.parse_args().names
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {ROWS} x {LENGTH} tokens, LoRA rank {RANK} on q, k, v"
    )
    print("| method | passes stated | FLOPs / SFT's |\n|---|---|---|")
    for name, ratio in ratios(names).items():
        print(f"| `{name}` | {stated(DEFENCES[name]):.3g} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
