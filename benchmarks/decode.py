"""Tokens/s of decoding: ours beside transformers one prompt at a time and at its best batch size, in one run.

    python benchmarks/decode.py --prompts=gsm8k@test.jsonl --tokenizer=FOLDER
    python benchmarks/decode.py --shape=llama2_7b --dtype=bfloat16 --batch=64        # a GPU; prints the share of the bandwidth ceiling

The model is a Llama with random weights, of 58 M parameters or with the shape of Llama-2-7B, and both sides decode greedily without
an end token, so that every text gets the same number of tokens. Compilation is timed apart. Without ``--prompts``, random ones of 60
to 180 tokens are used.

The ceiling: a step reads every weight but the embedding table once, and the keys and values of every row, at the memory's bandwidth.
"""

import argparse
import math
import statistics
import time
from typing import Any

import jax
import numpy as np

from panacea_jax.data.encode import encode_prompt
from panacea_jax.data.sources import load_records
from panacea_jax.data.template import Template
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.generate import decode
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import Model, random_model
from panacea_jax.parallel import make_mesh
from panacea_jax.planning.topology import CHIPS, GPUS

SMALL = {
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "llama2_7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    },
}  # fmt: skip


def read_prompts(args: argparse.Namespace) -> list[list[int]]:
    """Token ids of the prompts, in the Alpaca template."""
    if not args.prompts:
        rng = np.random.default_rng(0)
        return [rng.integers(3, 32000, n).tolist() for n in rng.integers(60, 181, args.num_prompts)]
    tokenizer = load_tokenizer(args.tokenizer)
    records = load_records(args.prompts, "--prompts")[: args.num_prompts]
    return [encode_prompt(record, Template("alpaca", tokenizer)) for record in records]


def time_ours(model: Model, prompts: list[list[int]], args: argparse.Namespace) -> float:
    """Seconds of the second of two passes: the first compiles."""
    for label in ("first pass, compiling", "second pass"):
        start = time.perf_counter()
        results = decode.generate(
            model, model.weights, None, prompts,
            batch_size=args.batch, max_new_tokens=args.new_tokens, eos_ids=[], pad_id=0, cache_dtype=args.cache_dtype or None,
            shared=decode.common_prefix(prompts),
        )  # fmt: skip
        tokens = sum(len(ids) for _, ids, _ in results)
        seconds = time.perf_counter() - start
        if tokens != args.new_tokens * len(prompts):
            raise RuntimeError(f"{tokens} tokens instead of {args.new_tokens * len(prompts)}")
        print(f"ours, batch {args.batch}, {label}: {seconds:.1f} s, {tokens / seconds:.1f} tokens/s", flush=True)  # fmt: skip
    return seconds


def their_model(config: dict[str, Any], dtype: str) -> Any:
    """transformers' Llama of the same shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**config)).to(getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def time_theirs(model: Any, prompts: list[list[int]], batch: int, new_tokens: int) -> float:
    """Tokens/s of ``generate`` over the prompts, sorted by length and left-padded."""
    import torch

    ordered = sorted(prompts, key=len)
    start = time.perf_counter()
    for i in range(0, len(ordered), batch):
        rows = ordered[i : i + batch]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]).to(model.device)
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False
            )
        if out.shape[1] != width + new_tokens:
            raise RuntimeError("transformers stopped early")
    return len(ordered) * new_tokens / (time.perf_counter() - start)


def ceiling(model: Model, prompts: list[list[int]], args: argparse.Namespace) -> float | None:
    """Tokens/s if the device did nothing but read memory, all rows being occupied."""
    kind = jax.devices()[0].device_kind
    rates = [CHIPS[name].bandwidth for name in GPUS if kind.startswith(f"NVIDIA {name.upper()}")]
    if not rates:
        return None
    c, size = model.config, model.dtype.itemsize
    weights = (c.num_parameters() - c.vocab_size * c.hidden_size) * size
    context = statistics.mean(map(len, prompts)) + args.new_tokens / 2
    entry = c.head_dim * size if args.cache_dtype != "int8" else c.head_dim + 4
    cache = 2 * c.num_layers * c.num_kv_heads * entry * context
    return rates[0] / (weights / args.batch + cache)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", default="", help="TASK@FILE")
    parser.add_argument("--tokenizer", default="", help="folder, for --prompts")
    parser.add_argument("--num_prompts", type=int, default=256)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=64, help="rows of ours")
    parser.add_argument(
        "--tensor",
        type=int,
        default=1,
        help="devices that share the heads (of a CPU: as many are made of its cores); the rest share rows",
    )
    parser.add_argument("--cache_dtype", default="", help='"" or int8')
    parser.add_argument(
        "--theirs",
        type=int,
        nargs="*",
        default=[1, 8, 16, 32, 64],
        help="batch sizes of transformers",
    )
    parser.add_argument(
        "--theirs_one",
        type=int,
        default=16,
        help="prompts for transformers at batch 1, evenly spread over the lengths",
    )
    args = parser.parse_args()

    jax.config.update("jax_num_cpu_devices", args.tensor)
    prompts = read_prompts(args)
    config = {
        "model_type": "llama",
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        **SHAPES[args.shape],
    }
    model = random_model(
        config_from_dict(config),
        jax.random.key(0),
        mesh=make_mesh(tensor=args.tensor),
        dtype=args.dtype,
    )
    parameters = model.config.num_parameters() / 1e6
    lengths = sorted(map(len, prompts))
    print(
        f"{jax.devices()[0].device_kind}, {parameters:.0f} M parameters, {args.dtype}, "
        f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens"
    )
    ours = args.new_tokens * len(prompts) / time_ours(model, prompts, args)
    limit = ceiling(model, prompts, args)
    if limit:
        print(f"ours: {ours / limit:.1%} of the bandwidth ceiling of {limit:.0f} tokens/s")
    if not args.theirs:
        return
    del model
    theirs = their_model(config, args.dtype)
    few = sorted(prompts, key=len)[:: max(1, math.ceil(len(prompts) / args.theirs_one))]
    time_theirs(theirs, few[:1], 1, args.new_tokens)  # warm
    speeds = {}
    for size in args.theirs:
        speeds[size] = time_theirs(theirs, few if size == 1 else prompts, size, args.new_tokens)
        print(f"transformers, batch {size}: {speeds[size]:.1f} tokens/s", flush=True)
    best = max(speeds, key=lambda size: speeds[size])
    if 1 in speeds:
        print(f"ours / transformers at batch 1: {ours / speeds[1]:.2f}")
    print(f"ours / transformers at its best batch ({best}): {ours / speeds[best]:.2f}")


if __name__ == "__main__":
    main()
