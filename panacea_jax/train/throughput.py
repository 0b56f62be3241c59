"""Tokens per second and model FLOPs utilisation (MFU)."""

import jax

from panacea_jax.parallel.chips import CHIPS

# The chip that a device's kind begins with. A device that is not listed has no MFU.
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100": "a100",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak of one device, by the longest listed name that its kind begins with."""
    names = [name for name in DEVICE_KINDS if device.device_kind.startswith(name)]
    return CHIPS[DEVICE_KINDS[max(names, key=len)]].flops if names else None


def train_flops_per_token(matmul_parameters: int, full_parameters: bool) -> int:
    """Model FLOPs of one forward and backward pass over one token.

    2 N forward and 2 N for the gradient by the activations; 2 N more for the gradient by the weights when these are trained. Attention
    scores and recomputation under remat are not counted, which is the custom and makes the MFU a lower bound.
    """
    return (6 if full_parameters else 4) * matmul_parameters
