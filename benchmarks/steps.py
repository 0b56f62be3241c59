"""Step time, memory, MFU and decoded tokens/s of SFT and Panacea at a model's shape, on random weights.

    python benchmarks/steps.py --config_json=config.json --dtype=bfloat16 --rank=32 --batch=10 --length=256 --remat=full

Only the shape matters, so no weights are needed: any Hugging Face config.json will do (Llama-2-7B's for
the published setting). With --torch the same SFT and Panacea steps are timed in PyTorch + peft on the CPU,
in the same run, and the ratio is printed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from panacea_jax.data.batches import Batch
from panacea_jax.defences import Panacea, Sft
from panacea_jax.generate.decode import generate
from panacea_jax.models import lora
from panacea_jax.models.config import ModelConfig
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import Model, random_model
from panacea_jax.train import throughput
from panacea_jax.train.optimizer import make_optimizer
from panacea_jax.train.step import init_state, make_step

PASSES = {"sft": 1, "panacea": 3}


def batch(rng: np.random.Generator, config: ModelConfig, rows: int, length: int) -> Batch:
    """Full rows of random tokens, the second half of each to be predicted."""
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (rows, length)), jnp.int32)
    response = jnp.broadcast_to(jnp.arange(length) >= length // 2, (rows, length))
    return Batch(tokens, response, jnp.ones((rows, length), bool))


def time_steps(model: Model, name: str, args: argparse.Namespace) -> float:
    """Median seconds of a step, compilation left out."""
    rng = np.random.default_rng(0)
    batches = {n: batch(rng, model.config, args.batch, args.length) for n in ("user", "harmful")}
    params = lora.init(model, args.rank, 4, key=jax.random.key(1))
    defence: Any = Sft() if name == "sft" else Panacea(rho=1.0, lam=1e-3)
    optimizer = make_optimizer(2e-5)
    state = init_state(params, defence, optimizer)
    step = make_step(model, defence, optimizer, jax.tree.map(lambda x: x.sharding, state))
    key, times = jax.random.key(0), []
    for i in range(args.repeats + 2):
        start = time.perf_counter()
        state, metrics = step(state, model.weights, batches, key)
        jax.block_until_ready(metrics)
        if i >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def time_torch(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, float]:
    """The same steps in PyTorch + peft on this CPU."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(known, dtype=getattr(torch, args.dtype))
    model = get_peft_model(
        model, LoraConfig(r=args.rank, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj"])
    )
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-5, weight_decay=0.1)
    tokens = torch.randint(0, known.vocab_size, (args.batch, args.length))
    labels = tokens.clone()
    labels[:, : args.length // 2] = -100

    def gradient() -> list[Any]:
        return list(torch.autograd.grad(model(input_ids=tokens, labels=labels).loss, params))

    def step(name: str) -> None:
        grads = gradient()
        if name == "panacea":
            h = gradient()
            scale = 1.0 / (torch.sqrt(sum((x**2).sum() for x in h)) + 1e-7)
            with torch.no_grad():
                for p, x in zip(params, h):
                    p += scale * x
            h2 = gradient()
            with torch.no_grad():
                for p, x in zip(params, h):
                    p -= scale * x
            grads = [g - 1e-3 * (b - a) for g, a, b in zip(grads, h, h2)]
        for p, g in zip(params, grads):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    found = {}
    for name in PASSES:
        times = []
        for i in range(args.repeats + 1):
            start = time.perf_counter()
            step(name)
            if i:
                times.append(time.perf_counter() - start)
        found[name] = statistics.median(times)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config_json", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--decode_batch", type=int, default=32)
    parser.add_argument("--torch", action="store_true")
    args = parser.parse_args()
    hf_config = json.loads(args.config_json.read_text())
    config = config_from_dict(hf_config)
    model = random_model(config, jax.random.key(0), dtype=args.dtype, remat=args.remat)
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind} x{jax.device_count()}, {args}")
    peak = throughput.peak_flops(device)
    theirs = time_torch(args, hf_config) if args.torch else {}
    for name, passes in PASSES.items():
        seconds = time_steps(model, name, args)
        flops = passes * args.batch * args.length
        flops *= throughput.train_flops_per_token(config.matmul_parameters(), False)
        mfu = f", MFU {flops / seconds / peak / jax.device_count():.1%}" if peak else ""
        ratio = f", PyTorch {theirs[name]:.3f} s (x{theirs[name] / seconds:.2f})" if theirs else ""
        print(f"{name}: {seconds:.3f} s a step, {flops / seconds / 1e12:.2f} TFLOP/s{mfu}{ratio}")
    memory = device.memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        print(f"peak memory {memory['peak_bytes_in_use'] / 2**30:.1f} GiB")
    prompts = [[5] * 100] * args.decode_batch
    for _ in range(2):  # the first compiles
        start = time.perf_counter()
        sizes = {"batch_size": args.decode_batch, "max_new_tokens": args.new_tokens}
        list(generate(model, model.weights, None, prompts, eos_ids=[-1], pad_id=0, **sizes))
        seconds = time.perf_counter() - start
    print(f"decode: {args.decode_batch * args.new_tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    main()
