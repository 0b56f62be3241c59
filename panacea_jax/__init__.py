"""Defences against harmful fine-tuning of large language models, in JAX.

import panacea_jax as pj
model = pj.load("path/to/hf-folder")
params = pj.lora.init(model, rank=32, alpha=4, targets=("q", "k", "v"), key=key)
result = pj.finetune(model, params, pj.defences.Panacea(rho=1.0, lam=1e-3), streams, optimizer=optimizer, steps=2000)
pj.export_adapter(result, "out/adapter")
"""

from panacea_jax import defences, perturbation
from panacea_jax.analysis.layers import layer_coefficients
from panacea_jax.errors import InputError
from panacea_jax.export import export_adapter, export_model
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import Model, load
from panacea_jax.parallel import make_mesh
from panacea_jax.train.loop import Result, finetune
from panacea_jax.train.once import apply_once
from panacea_jax.train.optimizer import make_optimizer

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Model",
    "Result",
    "apply_once",
    "defences",
    "export_adapter",
    "export_model",
    "finetune",
    "full_parameters",
    "layer_coefficients",
    "load",
    "lora",
    "make_mesh",
    "make_optimizer",
    "perturbation",
]
