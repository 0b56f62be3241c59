"""Device mesh and sharding rules."""

from panacea_jax.parallel.mesh import make_mesh
from panacea_jax.parallel.sharding import batch_sharding, replicated, weight_sharding

__all__ = ["batch_sharding", "make_mesh", "replicated", "weight_sharding"]
