"""Defences against harmful fine-tuning of large language models, in JAX.

    import panacea_jax as pj
    model = pj.load("path/to/hf-folder")
    params = pj.lora.init(model, rank=32, alpha=4, targets=("q", "k", "v"), key=key)
    result = pj.finetune(model, params, pj.defences.Panacea(rho=1.0, lam=1e-3), streams, optimizer=optimizer, steps=2000)
    pj.export_adapter(result, "out/adapter")

Names are imported when they are first used, so that the command line answers ``--help`` without waiting for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from panacea_jax import defences, perturbation
    from panacea_jax.analysis.layers import layer_coefficients
    from panacea_jax.errors import InputError
    from panacea_jax.export import export_adapter, export_model
    from panacea_jax.healing.trial import Healed, heal
    from panacea_jax.models import lora
    from panacea_jax.models.full import full_parameters
    from panacea_jax.models.model import Model, load
    from panacea_jax.parallel import make_mesh
    from panacea_jax.train.loop import Result, finetune
    from panacea_jax.train.once import apply_once
    from panacea_jax.train.optimizer import make_optimizer

__version__ = "0.1.0"

__all__ = [
    "Healed",
    "InputError",
    "Model",
    "Result",
    "apply_once",
    "defences",
    "export_adapter",
    "export_model",
    "finetune",
    "full_parameters",
    "heal",
    "layer_coefficients",
    "load",
    "lora",
    "make_mesh",
    "make_optimizer",
    "perturbation",
]

# Where each public name is defined; the modules among them are named alone.
_HOME = {
    "defences": "panacea_jax.defences",
    "perturbation": "panacea_jax.perturbation",
    "lora": "panacea_jax.models.lora",
    "InputError": "panacea_jax.errors",
    "layer_coefficients": "panacea_jax.analysis.layers",
    "export_adapter": "panacea_jax.export",
    "export_model": "panacea_jax.export",
    "full_parameters": "panacea_jax.models.full",
    "heal": "panacea_jax.healing.trial",
    "Healed": "panacea_jax.healing.trial",
    "Model": "panacea_jax.models.model",
    "load": "panacea_jax.models.model",
    "make_mesh": "panacea_jax.parallel",
    "Result": "panacea_jax.train.loop",
    "finetune": "panacea_jax.train.loop",
    "apply_once": "panacea_jax.train.once",
    "make_optimizer": "panacea_jax.train.optimizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    return module if _HOME[name].rpartition(".")[2] == name else getattr(module, name)
