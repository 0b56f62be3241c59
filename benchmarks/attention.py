"""The fused attention of this accelerator beside plain XLA: how far apart, and how fast, for the shapes of each architecture.

    python benchmarks/attention.py                          # a GPU (cuDNN) or a TPU (splash)
    python benchmarks/attention.py --rows 1 --lengths 4096

One layer's attention in bfloat16 with padding behind every second row, forward and with its gradients. Errors are the largest
difference, relative to the largest value, from the plain way in float32; plain bfloat16 is beside it. Times are the fastest of a few runs.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from panacea_jax.models.attention import attend
from panacea_jax.models.config import ModelConfig
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.fused import choose_backend, fused_attention
from panacea_jax.parallel import make_mesh

# What their config.json say of attention.
SHAPES: dict[str, dict[str, Any]] = {
    "llama2_7b": {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 32},
    "llama3_8b": {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8},
    "mistral_7b": {"model_type": "mistral", "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2_7b": {"model_type": "qwen2", "num_attention_heads": 28, "num_key_value_heads": 4},
    "gemma_7b": {"model_type": "gemma", "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256},
    "gemma2_9b": {
        "model_type": "gemma2", "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 256,
    },
}  # fmt: skip
RUNS = 10


def model_of(name: str) -> ModelConfig:
    """One layer of an architecture, small but for its attention."""
    shape = {"head_dim": 128, **SHAPES[name]}
    small = {
        "vocab_size": 8, "hidden_size": 128 * shape["num_attention_heads"], "intermediate_size": 8, "num_hidden_layers": 1,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    return config_from_dict(small | shape)


def operands(model: ModelConfig, rows: int, length: int) -> tuple[Any, ...]:
    """q, k, v in bfloat16, segments and mask."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (rows, length, model.num_heads, model.head_dim), jnp.bfloat16)
    k, v = (
        jax.random.normal(
            key, (rows, model.num_kv_heads, length, model.head_dim), jnp.bfloat16
        )
        for key in keys[1:]
    )  # fmt: skip
    place = jnp.arange(length)
    ends = jnp.where(jnp.arange(rows) % 2, length - length // 4, length)
    valid = place < ends[:, None]
    distance = place[:, None] - place
    mask = valid[:, None] & (distance >= 0) & (distance < (model.windows or (length,))[0])
    return q, k, v, valid.astype(jnp.int32), mask


def with_gradients(
    attention: Callable[..., jax.Array], valid: jax.Array
) -> Callable[..., tuple[jax.Array, ...]]:
    """Output at the valid places, and the gradients of a loss on it."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = jnp.where(valid[..., None, None], attention(q, k, v), 0)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradients

    return jax.jit(run)


def seconds(run: Callable[..., Any], *args: Any) -> float:
    """The fastest of some runs, after one that compiles."""
    jax.block_until_ready(run(*args))
    best = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        best = min(best, time.perf_counter() - start)
    return best


def error(got: tuple[jax.Array, ...], want: tuple[jax.Array, ...]) -> float:
    """Largest difference of any output, relative to its largest value."""
    pairs = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in zip(got, want)]
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 2048])
    args = parser.parse_args()
    device = jax.devices()[0]
    mesh = make_mesh(1, 1, 1, [device])
    print(f"{device.device_kind}, jax {jax.__version__}, bfloat16, {args.rows} rows")
    print(f"{'shape':12} {'length':>6} {'back-end':8} {'error':>8} {'plain':>8} {'ms':>8} {'plain':>8}")  # fmt: skip
    for name in args.shapes:
        model = model_of(name)
        backend = choose_backend("auto", model, jnp.bfloat16, device)
        if backend.name == "xla":
            print(f"{name:12} {backend.why}")
            continue
        for length in args.lengths:
            q, k, v, segments, mask = operands(model, args.rows, length)
            fused = fused_attention(backend.name, model, mesh, segments, mask, None, segments.sum(axis=1))
            if fused is None:
                print(f"{name:12} {length:6} {backend.name} does not take rows of this length")
                continue

            def plain(
                q: Any, k: Any, v: Any, mask: Any = mask, model: ModelConfig = model
            ) -> jax.Array:
                return attend(q, k, v, mask, model.query_scale, model.attention_softcap)

            ours = with_gradients(lambda q, k, v, f=fused: f(q, k, v, None), segments > 0)
            theirs = with_gradients(plain, segments > 0)
            exact = theirs(*(x.astype(jnp.float32) for x in (q, k, v)))
            print(
                f"{name:12} {length:6} {backend.name:8} {error(ours(q, k, v), exact):8.1e} {error(theirs(q, k, v), exact):8.1e} "
                f"{1e3 * seconds(ours, q, k, v):8.2f} {1e3 * seconds(theirs, q, k, v):8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
