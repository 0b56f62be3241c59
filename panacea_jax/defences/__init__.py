"""Every defence behind one protocol, by name."""

from typing import Any

from panacea_jax.defences.loss import Loss
from panacea_jax.defences.panacea import Panacea
from panacea_jax.defences.protocol import Defence, LossFn
from panacea_jax.defences.random_perturbation import RandomPerturbation
from panacea_jax.defences.random_vaccine import RandomVaccine
from panacea_jax.defences.sft import Sft
from panacea_jax.defences.t_vaccine import TVaccine
from panacea_jax.defences.vaccine import Vaccine

DEFENCES: dict[str, type[Any]] = {
    "sft": Sft,
    "vaccine": Vaccine,
    "random_vaccine": RandomVaccine,
    "t_vaccine": TVaccine,
    "panacea": Panacea,
    "random_perturbation": RandomPerturbation,
}

__all__ = [
    "DEFENCES",
    "Defence",
    "Loss",
    "LossFn",
    "Panacea",
    "RandomPerturbation",
    "RandomVaccine",
    "Sft",
    "TVaccine",
    "Vaccine",
]
