"""What the parts of a step take, and what makes it cheaper: timed in turns in one run, on random weights.

    python benchmarks/cheaper.py --config_json=config.json --dtype=float32 --rank=16 --batch=8 --length=64 --answers=3 --layers=upper:10

The first table leaves the parts of an SFT step out one after the other; what is missing then is what the part takes. The second has
steps with every position predicted; with only the last ``--answers`` of a row; with an adapter of ``--layers``; with what enters the
lowest of them known; and with twice the rows, which is what two adapters side by side would take. Times are the least of the turns, of
the processor where that computes, so that other programs on it do not count.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from panacea_jax.data.batches import Batch
from panacea_jax.defences import Loss, Panacea, Sft
from panacea_jax.models import lora
from panacea_jax.models.decoder import Decoder
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.inputs import Inputs
from panacea_jax.models.layers import MLP, Attention
from panacea_jax.models.model import Model, random_model
from panacea_jax.train.optimizer import make_optimizer
from panacea_jax.train.step import init_state, make_step


def _no_embedding(self: Decoder, tokens: Any) -> Any:
    return jnp.broadcast_to(tokens[..., None], (*tokens.shape, self.config.hidden_size)).astype(self.dtype)


# What a step is without: the input goes through, or takes the shortest way to a number.
PARTS: dict[str, tuple[Any, str, Any]] = {
    "embedding": (Decoder, "embed", _no_embedding),
    "attention": (Attention, "__call__", lambda self, x, *rest: (x, None)),
    "MLP": (MLP, "__call__", lambda self, x, *rest: x),
    "lm head, cross-entropy": (Loss, "_sum", lambda self, params, x, batch, scale=None: (x.sum(dtype=jnp.float32), 1)),
}


def batch_of(model: Model, rows: int, length: int, answers: int) -> Batch:
    """Full rows, of which the last ``answers`` tokens are to be predicted."""
    tokens = jax.random.randint(jax.random.key(2), (rows, length), 0, model.config.vocab_size)
    response = jnp.broadcast_to(jnp.arange(length) >= length - answers, tokens.shape)
    return Batch(tokens.astype(jnp.int32), response, jnp.ones(tokens.shape, bool))


def stepper(
    model: Model, args: argparse.Namespace, batch: Batch, layers: str = "", known: bool = False, optimizer: Any = None
) -> Callable[[], float]:
    """A compiled step that times itself."""
    params = lora.init(model, args.rank, 4, args.targets, key=jax.random.key(1), layers=layers)
    if known:
        entering = jax.jit(lambda loss, p, b: loss.bind(p).entering(Inputs.of(b.tokens, b.valid)))
        batch = batch._replace(entering=entering(Loss.of(model), params, batch))
    defence: Any = Sft() if args.defence == "sft" else Panacea(rho=1.0, lam=1e-3)
    optimizer = make_optimizer(2e-5) if optimizer is None else optimizer
    state = init_state(params, defence, optimizer)
    step = make_step(model, defence, optimizer, jax.tree.map(lambda x: x.sharding, state))
    batches = dict.fromkeys(("user", *defence.streams), batch)
    clock = time.process_time if jax.devices()[0].platform == "cpu" else time.perf_counter

    def once() -> float:
        nonlocal state
        start = clock()
        state, metrics = step(state, model.weights, batches, jax.random.key(0))
        jax.block_until_ready(metrics)
        return clock() - start

    once()
    return once


def in_turns(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The least time of each."""
    times = [{name: step() for name, step in steps.items()} for _ in range(repeats)]
    return {name: min(t[name] for t in times) for name in steps}


def shares(model: Model, args: argparse.Namespace, batch: Batch) -> dict[str, float]:
    """Seconds of each part of a step, by how much less a step without it takes; ``"a step"`` is the whole."""
    steps = {"a step": stepper(model, args, batch)}
    for name, patch in PARTS.items():
        with mock.patch.object(*patch):
            steps[name] = stepper(model, args, batch)
    steps["optimizer"] = stepper(model, args, batch, optimizer=optax.identity())
    whole, *without = in_turns(steps, args.repeats).items()
    parts = {name: whole[1] - seconds for name, seconds in without}
    return parts | {"norms, sums, metrics": whole[1] - sum(parts.values()), whole[0]: whole[1]}


def main() -> None:
    """Measure and print as Markdown tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config_json", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--targets", nargs="+", default=["q", "k", "v", "o", "gate", "up", "down"])
    parser.add_argument("--layers", default="upper:10")
    parser.add_argument("--defence", choices=("sft", "panacea"), default="sft")
    parser.add_argument("--tables", nargs="+", default=["shares", "savings"])
    for name, default in {"rank": 16, "batch": 8, "length": 64, "answers": 3, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    config = config_from_dict(json.loads(args.config_json.read_text()))
    model = random_model(config, jax.random.key(0), dtype=args.dtype)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind} x{jax.device_count()}, {args}")
    every = batch_of(model, args.batch, args.length, args.length)
    few = batch_of(model, args.batch, args.length, args.answers)
    if "shares" in args.tables:
        print("| part | seconds | share |\n|---|---|---|")
        found = shares(model, args, few)
        for part, seconds in found.items():
            print(f"| {part} | {seconds:.3f} | {seconds / found['a step']:.1%} |")
    if "savings" in args.tables:
        times = in_turns({
            "every position predicted": stepper(model, args, every),
            f"{args.answers} of {args.length} predicted": stepper(model, args, few),
            f"adapter of {args.layers}": stepper(model, args, few, args.layers),
            "what enters it known": stepper(model, args, few, args.layers, known=True),
            "twice the rows, all layers": stepper(model, args, batch_of(model, 2 * args.batch, args.length, args.answers)),
        }, args.repeats)  # fmt: skip
        print("| a step | seconds | times faster |\n|---|---|---|")
        first = times["every position predicted"]
        for name, seconds in times.items():
            print(f"| {name} | {seconds:.3f} | {first / seconds:.2f} |")


if __name__ == "__main__":
    main()
