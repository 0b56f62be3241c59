"""Every test runs with shapes and types checked: jaxtyping annotations, by beartype."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook("panacea_jax", "beartype.beartype")
