"""Perturbations on the ρ-ball, as optax gradient transformations."""

from panacea_jax.perturbation.ball import norms, onto_ball, to_sphere

__all__ = ["norms", "onto_ball", "to_sphere"]
