"""FLOPs of one compiled step of every defence, as a multiple of SFT's, beside what its ``facts`` say.

    python benchmarks/passes.py            # or some: python benchmarks/passes.py panacea vaccine

XLA's cost analysis counts the body of a loop once, however often it runs, and the decoder is a loop over its layers; so the steps
counted here are traced with every ``lax.scan`` unrolled. The compiled program is counted, after XLA has dropped what no output needs:
that is why Vaccine's first pass, which has no adapter gradient to make and stops at the first layer's attention, costs a little less
than a pass. Of a ``lax.cond`` the second branch is traced, which is that of an ordinary step. The shape is one where the matrix
products of the layers dominate; all streams have the same.
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
from panacea_jax.defences.protocol import Defence, passes_of
from panacea_jax.models import lora
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import Model, random_model
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
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
ROWS, LENGTH, RANK = 8, 64, 8
# Where the defaults cannot be counted: 64 unrolled steps of an adversary, 8 active layers of 4, a form that has no second pass.
SETTINGS: dict[str, dict[str, Any]] = {
    "tar": {"inner_steps": 4, "inner_every": 2},
    "t_vaccine": {"layers": 2},
    "vlguard": {"mode": "sum"},
}


@contextlib.contextmanager
def unrolled() -> Iterator[None]:
    """Trace every ``lax.scan`` as so many copies of its body, and of every ``lax.cond`` the second branch."""
    scan = jax.lax.scan

    def ordinary(_: Any, first: Any, second: Any, *operands: Any) -> Any:
        return second(*operands)

    def copies(*args: Any, **settings: Any) -> Any:
        return scan(*args, **(settings | {"unroll": True}))

    with mock.patch.object(jax.lax, "scan", copies), mock.patch.object(jax.lax, "cond", ordinary):
        yield


def make_model() -> Model:
    """A random model of the shape."""
    return random_model(config_from_dict(SHAPE), jax.random.key(0), mesh=make_mesh(devices=jax.devices()[:1]))  # fmt: skip


def defence_of(name: str) -> Any:
    """The method as it is counted."""
    defence = DEFENCES[name](**SETTINGS.get(name, {})).for_steps(100)
    return defence.for_records(ROWS)


def _batch(seed: int, several: int) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, SHAPE["vocab_size"], (ROWS * several, LENGTH))
    response = np.broadcast_to(np.arange(LENGTH) >= LENGTH // 2, tokens.shape)
    return Batch(jnp.asarray(tokens, jnp.int32), jnp.asarray(response), jnp.ones(tokens.shape, bool))  # fmt: skip


def step_flops(model: Model, defence: Any, layers: str = "") -> float:
    """FLOPs of the compiled step, with an adapter of all or some layers."""
    params = lora.init(model, RANK, 4, ("q", "k", "v"), key=jax.random.key(1), layers=layers)
    # A method that leaves layers out of a step has an optimizer of its own.
    partial = {"partial": True} if defence.partial else {}
    optimizer = make_optimizer(1e-3, **partial)
    state = init_state(params, defence, optimizer)
    repeats = {name: spec.repeats for name, spec in defence.streams.items()}
    names = ("user", *defence.streams)
    batches = {name: _batch(i, repeats.get(name, 1)) for i, name in enumerate(names)}
    if defence.by_record:
        numbers = jnp.broadcast_to(jnp.arange(ROWS)[:, None], (ROWS, LENGTH))
        batches["user"] = batches["user"]._replace(numbers=numbers)
    with unrolled():
        step: Any = make_step(model, defence, optimizer, jax.tree.map(lambda x: x.sharding, state))
        compiled = step.lower(state, model.weights, batches, jax.random.key(0)).compile()
    return float(compiled.cost_analysis()["flops"])


def stated(defence: Any) -> float:
    """The sum of ``facts.passes``, or of the instance's where hyper-parameters change them."""
    return float(sum(passes_of(defence).values()))


def ratios(names: list[str]) -> Iterator[tuple[str, float]]:
    """Names with their measured ratio to SFT, as they are compiled."""
    model = make_model()
    sft = step_flops(model, defence_of("sft"))
    for name in names:
        yield name, step_flops(model, defence_of(name)) / sft


def main() -> None:
    """Measure and print as a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stepping = [name for name, kind in DEFENCES.items() if issubclass(kind, Defence)]
    parser.add_argument(
        "names", nargs="*", default=stepping, help="defences; by default all with steps"
    )
    names = parser.parse_args().names
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {ROWS} x {LENGTH} tokens, LoRA rank {RANK} on q, k, v"
    )
    print("| method | passes stated | FLOPs / SFT's |\n|---|---|---|")
    for name, ratio in ratios(names):
        print(f"| `{name}` | {stated(defence_of(name)):.3g} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
