"""Attention back-ends. ``"xla"`` is the plain reference that every other one is tested against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from panacea_jax.errors import InputError
from panacea_jax.models.config import ModelConfig


def resolve(attention: str, config: ModelConfig) -> str:
    """The back-end to use for ``config.model.attention``; ``"auto"`` picks the best one for the
    model and machine.

    Raises:
        InputError: unknown name, or a back-end that is not available.
    """
    if attention in ("auto", "xla"):
        return "xla"
    if attention in ("cudnn", "splash"):
        raise InputError(
            f"config.model.attention = {attention}: not available yet for {config.model_type}; "
            "use auto or xla"
        )
    raise InputError(
        f"config.model.attention = {attention}: unknown; one of auto, xla, cudnn, splash"
    )


def attend(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B KV S hd"],
    v: Float[Array, "B KV S hd"],
    mask: Bool[Array, "B T S"],
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T H hd"]:
    """Softmax attention with grouped queries: query head h reads key/value head h // (H/KV), which
    is never repeated in memory.

    Scores and softmax are in at least float32. A row whose mask is all False (a padding query)
    gives the mean of ``v``: finite, as is its gradient.

    Args:
        q: queries. k: keys. v: values.
        mask: True where the query may see the key.
        scale: multiplier of q·k.
        softcap: c; scores become c·tanh(scores/c) before masking (Gemma 2, arXiv 2408.00118, §2).
    """
    b, t, heads, dim = q.shape
    kv_heads = k.shape[1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(b, t, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("btkgd,bksd->bkgts", grouped, k, preferred_element_type=wide) * scale
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    # The lowest finite number, not -inf: an all-masked row would otherwise be 0/0.
    lowest = jnp.finfo(wide).min  # type: ignore[no-untyped-call]
    scores = jnp.where(mask[:, None, None], scores, lowest)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bksd->btkgd", weights, v)
    return out.reshape(b, t, heads, dim)
