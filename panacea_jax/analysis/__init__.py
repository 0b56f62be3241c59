"""What a finished run can tell: which layers carry safety."""

from panacea_jax.analysis.layers import layer_coefficients

__all__ = ["layer_coefficients"]
