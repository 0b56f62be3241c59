"""Fused attention for passes over whole texts: splash attention on TPUs, cuDNN's flash attention on GPUs.

Neither holds the ``[B, H, T, T]`` scores. A step through the key/value cache, whose scores are small, and a pass behind a shared
beginning go the plain way, :func:`panacea_jax.models.attention.attend`, which is also what both are tested against.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from panacea_jax.errors import InputError
from panacea_jax.models.config import ModelConfig
from panacea_jax.parallel.sharding import ROWS, batch_rows

BACKENDS = ("auto", "xla", "cudnn", "splash")
# Tokens of a splash block, the largest that divides the row; rows are padded to a multiple of the last.
BLOCKS = (512, 256, 128)
# Run Pallas kernels without a TPU, for tests.
INTERPRET = False


class Backend(NamedTuple):
    """What computes attention: ``"xla"``, ``"cudnn"`` or ``"splash"``, and why."""

    name: str
    why: str


def choose_backend(asked: str, config: ModelConfig, dtype: Any, device: Any) -> Backend:
    """The back-end for ``config.model.attention``.

    Args:
        asked: one of ``BACKENDS``.
        config: of the model.
        dtype: that queries, keys and values have.
        device: one of those that compute; its platform and, of a GPU, its compute capability count.

    Raises:
        InputError: it cannot be used here; says why.
    """
    if asked == "xla":
        return Backend("xla", "as asked")
    fused = {"tpu": "splash", "gpu": "cudnn"}.get(device.platform) if asked == "auto" else asked
    if fused is None:
        return Backend("xla", f"a {device.platform} has no other")
    obstacle = (_splash_obstacle if fused == "splash" else _cudnn_obstacle)(config, dtype, device)
    if asked != "auto":
        if obstacle:
            raise InputError(f"config.model.attention = {asked}: {obstacle}; use auto or xla")
        return Backend(asked, "as asked")
    if obstacle:
        return Backend("xla", f"not {fused}: {obstacle}")
    return Backend(fused, f"the {device.platform} and the model allow it")


def _splash_obstacle(config: ModelConfig, dtype: Any, device: Any) -> str:
    if device.platform != "tpu" and not INTERPRET:
        return f"it needs a TPU, this is a {device.platform}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {jnp.dtype(dtype).name}"
    return ""


def _cudnn_obstacle(config: ModelConfig, dtype: Any, device: Any) -> str:
    if device.platform != "gpu":
        return f"it needs an NVIDIA GPU, this is a {device.platform}"
    said = str(getattr(device, "compute_capability", ""))
    try:
        capability = float(said)
    except ValueError:  # AMD's are names, such as gfx942
        return f"it needs an NVIDIA GPU, this is a {said or device.platform}"
    if capability < 8:
        return f"it needs compute capability 8.0, this GPU has {capability}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if config.attention_softcap is not None:
        return f"it cannot cap scores as {config.model_type} does"
    most = 256 if capability >= 9 else 128
    if config.head_dim > most or config.head_dim % 8:
        return f"it takes heads of up to {most} in steps of 8, not {config.head_dim}"
    return ""


Fused = Callable[[Array, Array, Array, Array | None], Array]


def fused_attention(
    backend: str,
    config: ModelConfig,
    mesh: Mesh,
    segments: Int[Array, "B T"],
    mask: Bool[Array, "B T T"],
    distance: Int[Array, "B T T"] | None,
    lengths: Int[Array, "B"] | None = None,
) -> Fused | None:
    """``f(q [B, T, H, hd], k [B, KV, T, hd], v, window) -> [B, T, H, hd]``, or None where the rows' length does not allow it.

    Args:
        backend: ``"splash"`` or ``"cudnn"``.
        config: of the model.
        mesh: rows are split over all its axes but ``tensor``, heads over that, where these divide them.
        segments: tokens see those of their own number, themselves and before them; 0 is padding.
        mask: the same, and the window where all layers have the same.
        distance: tokens from key to query, where layers differ in their window.
        lengths: tokens of each row, where it is one text and padding stands behind it.
    """
    if backend == "splash":
        return functools.partial(_splash, config, mesh, segments)
    if segments.shape[1] % 2:
        return None
    if lengths is not None and distance is None:
        return functools.partial(_cudnn, config, functools.partial(_by_lengths, config, lengths))
    return functools.partial(_cudnn, config, functools.partial(_by_mask, mask, distance))


def _by_lengths(config: ModelConfig, lengths: Int[Array, "B"], window: Int[Array, ""] | None) -> dict[str, Any]:
    """What cuDNN may see, by the lengths of the rows: no mask of T² is read, none has a gradient, and half of the scores are left out. A
    row has one token at least, since none would be 0/0.
    """
    width = config.windows[0] if config.windows else 0
    lengths = jnp.maximum(lengths, 1)
    local = (width - 1, 0) if width else None
    return {"is_causal": True, "query_seq_lengths": lengths, "key_value_seq_lengths": lengths, "local_window_size": local}


def _by_mask(mask: Bool[Array, "B T T"], distance: Int[Array, "B T T"] | None, window: Int[Array, ""] | None) -> dict[str, Any]:
    """The same by a mask. A row that sees nothing would be 0/0: padding sees itself."""
    if window is not None and distance is not None:
        mask = mask & ((window == 0) | (distance < window))
    return {"mask": (mask | jnp.eye(mask.shape[-1], dtype=bool))[:, None]}


def _cudnn(
    config: ModelConfig,
    seen: Callable[[Array | None], dict[str, Any]],
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B KV T hd"],
    v: Float[Array, "B KV T hd"],
    window: Int[Array, ""] | None,
) -> Float[Array, "B T H hd"]:
    """cuDNN splits over devices as its operands are."""
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    return jax.nn.dot_product_attention(q, k, v, scale=config.query_scale, implementation="cudnn", **seen(window))


def _splash(
    config: ModelConfig,
    mesh: Mesh,
    segments: Int[Array, "B T"],
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B KV T hd"],
    v: Float[Array, "B KV T hd"],
    window: Int[Array, ""] | None,
) -> Float[Array, "B T H hd"]:
    """One kernel for each device's rows and heads, and for each window that the rows are long enough for."""
    length = q.shape[1]
    pad = -length % BLOCKS[-1]
    across = (ROWS if len(q) % batch_rows(mesh) == 0 else None,)
    # A single key/value head is on every device; several are split only where that gives each query its own.
    tensor = mesh.shape["tensor"]
    split = k.shape[1] % tensor == 0 or (k.shape[1] == 1 and q.shape[2] % tensor == 0)
    heads = PartitionSpec(*across, "tensor" if split else None)
    shared = heads if k.shape[1] % tensor == 0 else PartitionSpec(*across)
    windows = sorted({w if w < length else 0 for w in config.windows or (0,)})

    def local(q: Array, k: Array, v: Array, segments: Array, window: Array) -> Array:
        def attend(width: int) -> Callable[[], Array]:
            kernel = _kernel(q.shape[1], q.shape[2], width, config.attention_softcap)
            ids = splash.SegmentIds(q=segments, kv=segments)
            return lambda: jax.vmap(kernel)(q, k, v, ids)

        if len(windows) == 1:
            return attend(windows[0])()
        known = jnp.asarray(windows)
        chosen = jnp.where(window < length, window, 0)
        return jax.lax.switch(jnp.searchsorted(known, chosen), [attend(w) for w in windows])

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(heads, shared, shared, PartitionSpec(*across), PartitionSpec()),
        out_specs=heads, check_vma=False,
    )  # fmt: skip
    rows = jnp.swapaxes(q * jnp.asarray(config.query_scale, q.dtype), 1, 2)
    rows, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (rows, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, pad)))
    window = jnp.int32(0) if window is None else window
    return jnp.swapaxes(run(rows, k, v, segments, window)[:, :, :length], 1, 2)


def _kernel(heads: int, length: int, window: int, softcap: float | None) -> Any:
    """Causal attention within a window; 0 for none."""
    shape = (length, length)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    block = next(b for b in BLOCKS if length % b == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        attn_logits_soft_cap=softcap, interpret=INTERPRET,
    )  # fmt: skip
