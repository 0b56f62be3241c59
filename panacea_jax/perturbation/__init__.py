"""Perturbations on the ρ-ball, as optax gradient transformations, and directions taken off others."""

from panacea_jax.perturbation.ball import norms, onto_ball, to_sphere
from panacea_jax.perturbation.radii import LayerRule, stacked_layers
from panacea_jax.perturbation.span import inner, off_span

__all__ = ["LayerRule", "inner", "norms", "off_span", "onto_ball", "stacked_layers", "to_sphere"]
