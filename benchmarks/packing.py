"""What packing saves on a data set: tokens computed per label token, shapes, and time of a step on random weights.

    python benchmarks/packing.py --tokenizer=FOLDER --source=alpaca@train.jsonl.gz --batch=10 --length=256

Packed and unpacked steps are timed in turns, step by step on the same records, compilation left out. ``--layers=0``
leaves the timing out.
"""

import argparse
import statistics
import time
from typing import Any

import jax

from panacea_jax.data.batches import Batch, Stream, length_buckets
from panacea_jax.data.encode import encode_all
from panacea_jax.data.sources import load_records
from panacea_jax.data.template import Template
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.defences import Sft
from panacea_jax.models import lora
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import random_model
from panacea_jax.train.optimizer import make_optimizer
from panacea_jax.train.step import init_state, make_step


def main() -> None:
    """Print one line a form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--source", required=True)
    for name, default in {
        "records": 1000, "batch": 10, "length": 256, "steps": 100, "timed": 20,
        "layers": 6, "width": 384, "fixed": 0,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.tokenizer)
    records = load_records(args.source, "--source", need_output=True)[: args.records]
    examples = encode_all(records, Template("alpaca", tokenizer), args.length, "--source")
    streams = {
        packing: Stream(
            "user", examples, args.batch, 0, True, length_buckets(args.length),
            fixed_length=bool(args.fixed), packing=packing,
        )
        for packing in (False, True)
    }  # fmt: skip
    seconds = time_steps(args, streams, len(tokenizer)) if args.layers else {}
    for packing, stream in streams.items():
        batches = [stream.batch(t) for t in range(args.steps)]
        computed, labels, real = (
            sum(int(size(b)) for b in batches)
            for size in (
                lambda b: b.tokens.size,
                lambda b: b.loss_mask[:, 1:].sum(),
                lambda b: b.valid.sum(),
            )
        )
        shapes = {b.tokens.shape for b in batches}
        print(
            f"{'packed' if packing else 'unpacked':8}  {computed / labels:6.2f} tokens a label  "
            f"{1 - real / computed:4.0%} padding  {len(shapes)} shapes"
            + (f"  {seconds[packing]:.3f} s a step" if seconds else "")
        )
    if seconds:
        print(f"unpacked / packed: {seconds[False] / seconds[True]:.2f}")


def time_steps(
    args: argparse.Namespace, streams: dict[bool, Stream], vocabulary: int
) -> dict[bool, float]:
    """Mean over steps of the median of three, SFT with an adapter; each step packed and unpacked in turns."""
    config = config_from_dict({
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": args.width, "intermediate_size": 4 * args.width,
        "num_hidden_layers": args.layers, "num_attention_heads": 6, "num_key_value_heads": 6,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    })  # fmt: skip
    model = random_model(config, jax.random.key(0), dtype="float32")
    optimizer, key = make_optimizer(2e-5), jax.random.key(0)
    state = init_state(lora.init(model, 8, 4, key=jax.random.key(1)), Sft(), optimizer)
    step = make_step(model, Sft(), optimizer, jax.tree.map(lambda x: x.sharding, state))

    def seconds(state: Any, batch: Batch) -> tuple[Any, float]:
        start = time.perf_counter()
        state, metrics = step(state, model.weights, {"user": batch}, key)
        jax.block_until_ready(metrics)
        return state, time.perf_counter() - start

    total, seen = {False: 0.0, True: 0.0}, set()
    for t in range(args.timed):
        batches = {packing: jax.device_put(s.batch(t)) for packing, s in streams.items()}
        for packing, batch in batches.items():
            if (shape := (packing, batch.tokens.shape)) not in seen:
                seen.add(shape)
                state, _ = seconds(state, batch)
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(3):
            for packing, batch in batches.items():
                state, spent = seconds(state, batch)
                times[packing].append(spent)
        for packing in total:
            total[packing] += statistics.median(times[packing]) / args.timed
    return total


if __name__ == "__main__":
    main()
