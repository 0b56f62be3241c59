"""Tokens per second and model FLOPs utilisation (MFU)."""

import jax

# Dense bf16 peak, FLOP/s per chip, from the makers' data sheets. A device that is not listed has no MFU.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak of one device, by the longest listed name that its kind begins with."""
    names = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def train_flops_per_token(matmul_parameters: int, full_parameters: bool) -> int:
    """Model FLOPs of one forward and backward pass over one token.

    2 N forward and 2 N for the gradient by the activations; 2 N more for the gradient by the weights when these are trained. Attention
    scores and recomputation under remat are not counted, which is the custom and makes the MFU a lower bound.
    """
    return (6 if full_parameters else 4) * matmul_parameters
