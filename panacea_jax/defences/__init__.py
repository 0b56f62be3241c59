"""Every defence behind one protocol, by name."""

from typing import Any

from panacea_jax.defences.ewc import Ewc
from panacea_jax.defences.kl import Kl
from panacea_jax.defences.ldifs import Ldifs
from panacea_jax.defences.lisa import Lisa
from panacea_jax.defences.loss import Loss
from panacea_jax.defences.panacea import Panacea
from panacea_jax.defences.protocol import Defence, LossFn
from panacea_jax.defences.random_perturbation import RandomPerturbation
from panacea_jax.defences.random_vaccine import RandomVaccine
from panacea_jax.defences.sft import Sft
from panacea_jax.defences.vaccine import Vaccine
from panacea_jax.defences.vlguard import Vlguard

DEFENCES: dict[str, type[Any]] = {
    "sft": Sft,
    "vaccine": Vaccine,
    "random_vaccine": RandomVaccine,
    "panacea": Panacea,
    "lisa": Lisa,
    "ldifs": Ldifs,
    "ewc": Ewc,
    "kl": Kl,
    "vlguard": Vlguard,
    "random_perturbation": RandomPerturbation,
}

__all__ = [
    "DEFENCES",
    "Defence",
    "Ewc",
    "Kl",
    "Ldifs",
    "Lisa",
    "Loss",
    "LossFn",
    "Panacea",
    "RandomPerturbation",
    "RandomVaccine",
    "Sft",
    "Vaccine",
    "Vlguard",
]
