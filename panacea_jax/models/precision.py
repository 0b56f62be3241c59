"""The dtype in which sums, norms and logits are made, whatever the model computes in."""

from typing import Any

import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """``dtype``, or float32 where that holds more: bfloat16 cannot count far."""
    return jnp.promote_types(dtype, jnp.float32)
