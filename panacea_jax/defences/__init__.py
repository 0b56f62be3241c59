"""Every defence behind one protocol, by name."""

from panacea_jax.defences.panacea import Panacea
from panacea_jax.defences.protocol import Defence, LossFn
from panacea_jax.defences.random_perturbation import RandomPerturbation
from panacea_jax.defences.sft import Sft

DEFENCES: dict[str, type[Sft] | type[Panacea] | type[RandomPerturbation]] = {
    "sft": Sft,
    "panacea": Panacea,
    "random_perturbation": RandomPerturbation,
}

__all__ = ["DEFENCES", "Defence", "LossFn", "Panacea", "RandomPerturbation", "Sft"]
